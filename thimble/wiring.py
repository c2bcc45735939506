"""A picture of the graph of cerebros.py, or of a fork of it.

    wiring.draw(config, "runs/search_cerebros/wiring.png")
"""
import json
import math
import sys

from thimble import files

AGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 40)  # of tokens: the axis labels these and the oldest
ORANGE = "tab:orange"
GRAY = "gray"
RED = "tab:red"
LINES = {ORANGE: "reads a token", GRAY: "reads a unit below", RED: "lateral"}  # what the legend says


def levels_of(config):
    """The levels of units that a config holds, or that its seed draws; cerebros.draw_wiring describes them."""
    if config.wiring:
        return json.loads(config.wiring)
    return sys.modules[type(config).__module__].draw_wiring(config)


def draw(config, path):
    """Write a picture: levels from bottom to top, a unit's area by its neurons. UserError where that is impossible."""
    files.need("matplotlib", "a picture of a wiring")
    from matplotlib.figure import Figure

    levels = levels_of(config)
    at = positions(levels, config.window)
    figure = Figure(figsize=(9, 1.3 * len(levels) + 1.7), layout="constrained")
    axes = figure.subplots()
    for k, level in enumerate(levels, 1):
        for i, unit in enumerate(level):
            draw_unit(axes, unit, (k, i), at)
    read = set()
    for level in levels:
        for unit in level:
            read.update(unit["places"])
    draw_window(axes, config.window, read, at)
    for color, name in LINES.items():
        axes.plot([], [], color=color, label=name)  # draws nothing but an entry of the legend
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    names = ["window", *(f"level {k}" for k in range(1, len(levels))), "output"]
    axes.set_yticks(range(len(names)), names)
    axes.set(xticks=[], xlabel="age of a token, the newest is 1", xlim=(0, 1.02), ylim=(-0.5, len(levels) + 0.4))
    axes.spines[:].set_visible(False)
    try:
        with files.replacing(path) as temporary:
            figure.savefig(temporary, dpi=120)
    except ValueError as e:  # matplotlib does not know the file's suffix
        raise files.UserError(f"{path}: {files.short(e)}") from None


def positions(levels, W):
    """{(level, index): (x, y)} of the places of the window, level 0, and of the units."""
    at = {}
    for place in range(W):
        age = W - place
        # the newest at the right, and the older the closer together
        x = 0.98 - 0.96 * math.log(age) / math.log(W + 1)
        at[0, place] = x, 0
    for k, level in enumerate(levels, 1):
        shift = 0.0
        if k < len(levels):
            # to the left and right in turn, so that no unit hides the link between two others
            shift = 0.3 * (-1) ** k / len(level)
        for i in range(len(level)):
            x = (i + 0.5 + shift) / len(level)
            at[k, i] = x, k
    return at


def draw_unit(axes, unit, name, at):
    """A unit and the lines to all that it reads."""
    x, y = at[name]
    for place in unit["places"]:
        draw_line(axes, at[0, place], (x, y), ORANGE, width=0.6)
    for level, i in unit["units"]:
        if level == name[0]:
            draw_line(axes, at[level, i], (x, y), RED, bend=0.4)
        else:
            draw_line(axes, at[level, i], (x, y), GRAY)
    axes.scatter(x, y, s=2 * unit["neurons"] + 20, color="tab:blue", zorder=3)
    axes.annotate(str(unit["neurons"]), (x, y), ha="center", va="center", fontsize=7, color="white", zorder=4)


def draw_line(axes, source, target, color, width=0.9, bend=0):
    style = {"arrowstyle": "-", "linewidth": width, "color": color, "alpha": 0.7, "shrinkA": 0, "shrinkB": 0,
             "connectionstyle": f"arc3,rad={bend}", "zorder": 1}
    axes.annotate("", target, source, arrowprops=style)


def draw_window(axes, W, read, at):
    """The places of the window, gray where nothing reads them."""
    for place in range(W):
        x, y = at[0, place]
        color = "black" if place in read else "lightgray"
        axes.scatter(x, y, s=14, color=color, zorder=3)
        age = W - place
        if age in AGES or age == W:
            axes.annotate(str(age), (x, y - 0.1), ha="center", va="top", fontsize=7)
