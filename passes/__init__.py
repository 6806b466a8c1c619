"""Floor 3: the rewrites, one a file: a GraphModule in, a GraphModule out.

The folder stands at the root of the repository and is installed as ``mfpsn_fx.passes``.
"""

if __name__ != "mfpsn_fx.passes":
    raise ImportError(
        f"this package is mfpsn_fx.passes, but was imported as {__name__!r}; "
        "install the project (pip install -e .) and import mfpsn_fx.passes"
    )
