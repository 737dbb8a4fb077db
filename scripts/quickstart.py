"""The main job on a real model: train, evaluate on documents never seen, write the report.

`make quickstart` runs this. Run it again and it continues what was interrupted.
"""

import os
import sys
import time
from pathlib import Path

from sae.cli import main
from sae.configuration import from_command_line

CONFIG = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")

if __name__ == "__main__":
    start = time.monotonic()
    flags = ["--train.resume", "auto", *sys.argv[1:]]
    folder = from_command_line([CONFIG, *flags], "quickstart").run.folder
    assert folder is not None
    main(["train", CONFIG, *flags])
    main(["eval", folder])
    main(["report", folder])
    here = os.path.relpath(Path(sys.executable).parent)
    print(f"""
Done in {(time.monotonic() - start) / 60:.1f} minutes. The run is in {folder}. Next:

  {here}/sae eval {folder} --eval.tokens 65536
      measure it on more held-out text
  {here}/python scripts/explore.py {folder}
      read a prompt's latents, splice the dictionary in, steer with one latent
  {here}/sae train configs/quickstart.yaml --coder.k 64 --run.folder runs/k64
      train another
""")
