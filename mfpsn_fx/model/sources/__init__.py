"""What source neurons are: one adapter a library."""
