"""``python -m sandbox [logs|exchanges]``: without a word, the sites."""

import importlib
import sys

if __name__ == "__main__":
    chosen = sys.argv.pop(1) if sys.argv[1:2] in (["sites"], ["logs"], ["exchanges"]) else "sites"
    chosen = {"exchanges": "markets"}.get(chosen, chosen)
    sys.exit(importlib.import_module(f"sandbox.{chosen}").main())
