"""First run: load the embedded model, look at it, train some iterations, look again, save.

Run it as it is, or cell by cell: editors and Jupyter (through jupytext) know `# %%`.
"""

# %% The main job of `flowrl train`, shortened; any of its overrides may stand here.
from flowrl.api import load

experiment = load("sampler=cps", "loss=dppo", "num_iterations=20", "batch.prompts_per_iteration=8")
prompts = ["two red circles", "a blue square above a green triangle"]

# %% Images are tensors [B, 3, S, S] with values in [0, 1]; the reward is a verifier of shapes.
images = experiment.draw(prompts, count=4)
output = experiment.score(images, prompts)
print("rewards before:", [round(value, 2) for value in output.values.tolist()])

# %% Training may go on as often as one likes: two calls of 5 are one of 10, bitwise.
NUM_ITERATIONS = 5


def tell(row):
    """Print an iteration's reward, and its divergence from the policy that drew the samples."""
    reward, kl = row["reward/mean"], row["trust/kl_old"]
    print(f"{row['iteration']:>3.0f}  reward {reward:.3f}  KL {kl:.1e}")


experiment.train(NUM_ITERATIONS, tell)

# %% Before and after, from the same noise.
sheet = experiment.pictures(prompts)
sheet.save("before_and_now.png")  # in a notebook, `sheet` alone shows it

# %% A LoRA as stock diffusers loads it.
print("saved:", experiment.save("first_run"))
