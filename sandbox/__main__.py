"""``python -m sandbox [sites|logs|exchanges|broker]``, each with options of its own; without a word, the sites."""

import importlib
import sys

MODULES = {"sites": "sites", "logs": "logs", "exchanges": "markets", "broker": "broker"}

if __name__ == "__main__":
    word = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in MODULES else "sites"
    sys.exit(importlib.import_module(f"sandbox.{MODULES[word]}").main())
