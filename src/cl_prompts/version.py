"""The version of the library, where files and errors can name it."""

__version__ = "0.1.0"
