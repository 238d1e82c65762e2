"""The version of the package, which run directories record."""

__version__ = "0.1.0"
