"""Draws README's figure: the parts of Latent Policy Steering, and where values and gradients flow.

python -m benchmark.studies.concept.concept    # concept.svg and concept.png beside this file
"""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch

BLUE = "#1f5fa8"  # values
ORANGE = "#d4570a"  # gradients
GREY = "#555555"  # learning from the data
HALF_HEIGHT = 0.75
ROUND = "round,pad=0,rounding_size=0.12"


def box(axis, x, title, says, half_width):
    corner = (x - half_width, -HALF_HEIGHT)
    size = (2 * half_width, 2 * HALF_HEIGHT)
    axis.add_patch(FancyBboxPatch(corner, *size, boxstyle=ROUND, fc="white", ec="black"))
    axis.text(x, 0.42, title, ha="center", va="center", fontsize=16.5)
    axis.text(x, -0.36, says, ha="center", va="center", fontsize=14, color=GREY)


def arrow(axis, start, end, color, **looks):
    shape = dict(arrowstyle="-|>", mutation_scale=22, lw=2.2, shrinkA=0, shrinkB=0)
    axis.annotate("", end, start, arrowprops=shape | dict(color=color) | looks)


def sphere(axis, x):
    """The latents: a ball with two circles, random latents in grey, the actor's in blue."""
    radius = 0.75
    axis.add_patch(Circle((x, 0), radius, fc="#f3f6fa", ec="black"))
    angle = np.linspace(0, 2 * np.pi, 100)
    across = radius * np.cos(angle)
    up = radius * np.sin(angle)
    axis.plot(x + across, 0.25 * up, color="#bbbbbb", lw=1, zorder=2)
    axis.plot(x + 0.25 * across, up, color="#bbbbbb", lw=1, zorder=2)
    places = np.random.default_rng(3).normal(size=(40, 3))
    places *= radius / np.linalg.norm(places, axis=1, keepdims=True)
    front = places[places[:, 2] > 0]
    axis.scatter(x + front[:, 0], front[:, 1], s=16, color="#999999", zorder=3)
    axis.scatter(x + 0.3, 0.33, s=170, color=BLUE, edgecolors="white", zorder=4)
    axis.text(x, radius + 0.13, "sphere of latents", ha="center", fontsize=14, color=GREY)


def draw_flow(axis):
    """From the state to a value in blue, and the gradient's way back in orange."""
    for start, end, says in (
        (-0.6, -0.05, "$s$"),
        (2.55, 3.25, "$z$"),
        (4.75, 5.9, "$z$"),
        (8.3, 9.7, "$a$"),
        (12.3, 13.05, "$Q$"),
    ):
        arrow(axis, (start, 0.12), (end, 0.12), BLUE)
        axis.text((start + end) / 2, 0.24, says, ha="center", fontsize=16, color=BLUE)
    for start, end in ((9.7, 8.3), (5.9, 4.75), (3.25, 2.55)):
        arrow(axis, (start, -0.2), (end, -0.2), ORANGE, linestyle=(0, (4, 2)))
    for x, says in (
        (9.0, r"$\partial Q/\partial a$"),
        (5.26, r"$\partial a/\partial z$"),
        (2.9, r"$\partial z/\partial \ell$"),
    ):
        axis.text(x, -0.52, says, ha="center", fontsize=15, color=ORANGE)


def draw_data(axis):
    """What learns from the data, in grey."""
    size = (6.0, 0.72)
    axis.add_patch(FancyBboxPatch((6.1, -2.4), *size, boxstyle=ROUND, fc="#eeeeee", ec=GREY))
    says = "data: states, chunks of actions, rewards"
    axis.text(9.1, -2.04, says, ha="center", va="center", fontsize=15)
    for x, says in ((7.1, "imitation"), (11.0, "Q-learning")):
        arrow(axis, (x, -1.68), (x, -HALF_HEIGHT), GREY)
        axis.text(x + 0.15, -1.2, says, va="center", fontsize=14, color=GREY)


def main():
    figure, axis = plt.subplots(figsize=(14, 4.6))
    box(axis, 1.25, r"latent actor $\ell(s)$", "seeks the $z$ whose\nchunk is worth most", 1.3)
    sphere(axis, 4.0)
    box(axis, 7.1, r"policy $f(s, z)$", "a chunk of actions\nin one step", 1.2)
    box(axis, 11.0, r"critic $Q(s, a)$", "what the chunk\nis worth", 1.3)
    draw_flow(axis)
    draw_data(axis)
    says = "values: from the state to a chunk of actions and what it is worth"
    axis.text(-0.55, 1.3, says, fontsize=15, color=BLUE)
    says = (
        "gradients: through the critic and the policy,\nwhich they leave as they are, to the actor"
    )
    axis.text(-0.55, -1.3, says, fontsize=15, color=ORANGE, va="top")
    axis.set(xlim=(-0.7, 13.2), ylim=(-2.5, 1.6), aspect="equal")
    axis.axis("off")
    for kind in ("svg", "png"):
        path = Path(__file__).with_name(f"concept.{kind}")
        figure.savefig(path, bbox_inches="tight", dpi=110)
        print(path)


if __name__ == "__main__":
    main()
