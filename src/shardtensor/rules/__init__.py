"""The rules, by families of ops, and the engines below; importing this package registers them."""

import importlib
import pkgutil

for _found in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_found.name)
