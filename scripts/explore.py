"""Read a prompt through a dictionary, splice it into the model, steer with one latent.

python scripts/explore.py RUN [PROMPT]      RUN being a run folder that has its report: of an sae,
                                            or of a transcoder of one module
"""

import sys

from sae.analysis import open_run, splice, steer, strongest_latents

run = open_run(sys.argv[1])
prompt = sys.argv[2] if len(sys.argv) > 2 else "The president said on Tuesday"
place = (run.lm, run.hookpoint, run.coder)

for token, latents in strongest_latents(run.coder, run.lm, run.hookpoint, prompt, 3):
    for latent, activation in latents:
        contexts = [context.text for context in run.atlas.contexts(latent)[:2]]
        print(f"{token!r:>12}  latent {latent:>5}  {activation:6.1f}  {contexts}")

print("\nas it is:", run.generate(prompt))
with splice(*place, target=run.target):
    print("spliced: ", run.generate(prompt))
chosen = latents[0][0]  # the strongest latent of the prompt's last token
strength = 2 * float(run.atlas.features.max_activations[chosen])
with steer(*place, chosen, strength, target=run.target):
    print(f"steered with latent {chosen}:", run.generate(prompt))
