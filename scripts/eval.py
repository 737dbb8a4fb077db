"""Evaluate on several processes: accelerate launch scripts/eval.py RUN_OR_DICTIONARY …

The same as `sae eval RUN_OR_DICTIONARY …`.
"""

import sys

from sae.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
