"""A reward of one's own: a function of images and prompts is all that it takes."""

# %%
import torch

from flowrl.api import load
from flowrl.rewards.outputs import all_valid


# %% Values are one number a sample, on the CPU; parts are logged beside them, never trained on.
class Warm:
    """Rewards images whose red outweighs their blue."""

    part_names = ("red", "blue")

    def __call__(self, images, prompts):
        means = images.flatten(2).mean(2).cpu()  # [B, 3]
        return all_valid(means[:, 0] - means[:, 2], {"red": means[:, 0], "blue": means[:, 2]})


# %% It takes the place of the configured reward.
experiment = load("num_iterations=20", "batch.prompts_per_iteration=8", reward=Warm())
prompts = ["a circle", "two squares", "a triangle"]
before = experiment.score(experiment.draw(prompts, count=8), prompts).values.mean()

# %%
NUM_ITERATIONS = 10
rows = experiment.train(NUM_ITERATIONS)
print("reward of the samples:", [round(row["reward/mean"], 3) for row in rows])

# %% The average of the weights follows them slowly, and is what is drawn and saved.
now = experiment.score(experiment.draw(prompts, count=8), prompts).values.mean()
print(f"warmth {before:.3f} -> {now:.3f}")
experiment.pictures(prompts).save("warm.png")
assert torch.isfinite(now)
