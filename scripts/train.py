"""Train a dictionary under `accelerate launch`: accelerate launch scripts/train.py CONFIG.yaml …

The same as `sae train CONFIG.yaml …`.
"""

import sys

from sae.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
