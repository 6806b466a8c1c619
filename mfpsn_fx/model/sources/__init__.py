"""Descriptions of source neurons as filters, with one adapter module for each library."""
