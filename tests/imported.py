"""Modules as users import them."""

import importlib.util


def as_imported(module):
    """A copy of a module without the checks of types that tests add to it."""
    name = f"copy_of_{module.__name__.rpartition('.')[2]}"
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
