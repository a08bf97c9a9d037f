"""Data: embedded procedural digits, and loaders for the real sets.

Everything embedded is drawn by ONE rasteriser, `draw_strokes`: the distance from every pixel to thick line segments.
Images are float (B,C,H,W) in [0,1] while they are made and uint8 once they are stored. Points are (x, y), x to the
right, y down, in pixels with the centre of the top-left pixel at (0, 0).

A *look* turns grey digits (white on black) into colour images of another domain. `source` is the training look;
`LOOKS_UNSEEN` are measured, `LOOKS_DEV` are there to choose settings on: no setting may be chosen on the former.
"""
import gzip
import hashlib
import struct
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageOps

# Strokes of the ten digits in a unit box, as control points of smooth curves. Variants of a digit are further rows.
DIGITS = [
    (0, [[(.5, .08), (.2, .22), (.16, .55), (.3, .88), (.62, .92), (.82, .6), (.78, .25), (.5, .08)]]),
    (1, [[(.5, .08), (.5, .35), (.5, .65), (.5, .92)]]),
    (1, [[(.34, .26), (.44, .18), (.53, .08)], [(.53, .08), (.53, .5), (.53, .92)]]),
    (2, [[(.2, .28), (.34, .1), (.62, .08), (.78, .28), (.62, .52), (.38, .72), (.2, .9)],
         [(.2, .9), (.5, .9), (.82, .88)]]),
    (3, [[(.22, .16), (.5, .07), (.74, .2), (.66, .42), (.44, .48)],
         [(.44, .48), (.72, .54), (.8, .74), (.6, .92), (.22, .86)]]),
    (4, [[(.36, .1), (.3, .3), (.22, .52), (.5, .56), (.8, .54)], [(.68, .12), (.66, .5), (.62, .94)]]),
    (4, [[(.62, .08), (.4, .34), (.18, .62), (.5, .64), (.84, .62)], [(.62, .08), (.62, .5), (.62, .94)]]),
    (5, [[(.76, .1), (.5, .1), (.3, .12)],
         [(.3, .12), (.27, .45), (.5, .42), (.76, .55), (.74, .8), (.5, .93), (.2, .86)]]),
    (6, [[(.66, .08), (.38, .26), (.22, .58), (.28, .86), (.54, .93), (.76, .76), (.64, .55), (.4, .56),
          (.25, .72)]]),
    (7, [[(.2, .12), (.5, .12), (.8, .1)], [(.8, .1), (.62, .4), (.5, .66), (.42, .94)]]),
    (7, [[(.2, .12), (.5, .12), (.8, .1), (.62, .4), (.5, .66), (.42, .94)], [(.36, .52), (.55, .5), (.74, .5)]]),
    (8, [[(.5, .5), (.26, .36), (.3, .14), (.52, .07), (.72, .18), (.68, .38), (.5, .5)],
         [(.5, .5), (.24, .64), (.28, .88), (.52, .93), (.76, .84), (.74, .64), (.5, .5)]]),
    (9, [[(.74, .28), (.6, .09), (.34, .12), (.24, .34), (.42, .5), (.66, .44), (.74, .28)],
         [(.74, .28), (.72, .6), (.64, .94)]]),
]
CURVE_POINTS = 13  # points along a stroke: 12 straight segments look smooth at 32 pixels


def _curve(points, n):
    """n points evenly spaced along a Catmull-Rom curve through the control points."""
    p = np.array([points[0], *points, points[-1]], np.float64)
    t = np.linspace(0, 1, 12, endpoint=False)[:, None]
    pieces = []
    for a, b, c, d in zip(p, p[1:], p[2:], p[3:]):
        pieces.append(b + t * (c - a) / 2 + t ** 2 * (a - 2.5 * b + 2 * c - d / 2) + t ** 3 * (3 * b - a - 3 * c + d) / 2)
    dense = np.concatenate([*pieces, p[-1:]])
    length = np.r_[0, np.cumsum(np.linalg.norm(np.diff(dense, axis=0), axis=1))]
    at = np.linspace(0, length[-1], n)
    return np.stack([np.interp(at, length, dense[:, i]) for i in range(2)], 1)


def draw_strokes(start, end, radius, size, softness=.7):
    """Coverage in [0,1] of thick segments: max over segments of clamp((radius - distance)/softness + 1/2).

    start, end (B,S,2) pixels; radius (B,S) pixels; size (H,W). Returns (B,1,H,W).
    """
    height, width = size
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([xs, ys], -1).to(start)[None]  # (1,H,W,2)
    cover = start.new_zeros(start.shape[0], height, width)
    for a, b, r in zip(start.unbind(1), end.unbind(1), radius.unbind(1)):
        a, b, r = a[:, None, None], b[:, None, None], r[:, None, None]
        axis = b - a
        along = ((pixels - a) * axis).sum(-1) / axis.square().sum(-1).clamp_min(1e-6)
        nearest = a + along.clamp(0, 1)[..., None] * axis
        distance = torch.linalg.vector_norm(pixels - nearest, dim=-1)
        cover = torch.maximum(cover, ((r - distance) / softness + .5).clamp(0, 1))
    return cover[:, None]


def make_digits(n, size, seed, device="cpu"):
    """n random grey digits: jittered strokes, width, rotation, shear, scale and an elastic wave.

    Returns images (n,1,size,size) in [0,1], white on black, and labels (n,) int64.
    """
    gen = torch.Generator(device).manual_seed(seed)
    strokes = torch.zeros(len(DIGITS), 2, CURVE_POINTS, 2)
    for row, (_, curves) in enumerate(DIGITS):
        for k in range(2):  # a digit with one stroke draws it twice: the maximum does not change
            strokes[row, k] = torch.from_numpy(_curve(curves[min(k, len(curves) - 1)], CURVE_POINTS))
    images, labels = [], []
    for count in [min(500, n - i) for i in range(0, n, 500)]:
        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(count, *shape, generator=gen, device=device)

        label = torch.randint(10, (count,), generator=gen, device=device)
        variants = torch.tensor([[[i for i, d in enumerate(DIGITS) if d[0] == c][j % sum(d[0] == c for d in DIGITS)]
                                  for j in range(2)] for c in range(10)], device=device)
        row = variants[label, torch.randint(2, (count,), generator=gen, device=device)]
        p = strokes.to(device)[row] - .5  # (n,2,P,2), centred
        knots = uniform(-.07, .07, 4, 5)  # jittered control points, spread along the stroke
        p = p + nnf.interpolate(knots, size=CURVE_POINTS, mode="linear", align_corners=True) \
            .view(count, 2, 2, CURVE_POINTS).transpose(-1, -2)
        for frequency, amount in ((4, .05), (9, .025)):  # elastic: smooth waves that bend every stroke
            phase = uniform(0, 2 * np.pi, 1, 1, 2)
            p = p + amount * uniform(-1, 1, 1, 1, 2) * torch.sin(frequency * p.flip(-1) + phase)
        angle, shear = uniform(-.35, .35), uniform(-.35, .35)
        scale_x, scale_y = uniform(.4, .8), uniform(.5, .82)
        cos, sin = torch.cos(angle), torch.sin(angle)
        linear = torch.stack([scale_x * cos, scale_y * (shear * cos - sin), scale_x * sin,
                              scale_y * (shear * sin + cos)], -1).view(count, 1, 2, 2)
        p = p @ linear.transpose(-1, -2) + .5 + uniform(-.07, .07, 1, 1, 2)
        p = p * size - .5
        radius = uniform(.025, .06, 1) * size
        start, end = p[:, :, :-1].flatten(1, 2), p[:, :, 1:].flatten(1, 2)
        images.append(draw_strokes(start, end, radius.expand(-1, start.shape[1]), (size, size)))
        labels.append(label)
    return torch.cat(images), torch.cat(labels)


def textures(n, size, gen, roughness=(.5, 1.)):
    """n coloured natural-looking textures (n,3,size,size) in [0,1]: octaves of noise, mixed colours, a few edges."""
    def rand(*shape):
        return torch.rand(n, *shape, generator=gen, device=gen.device)

    fall = roughness[0] + (roughness[1] - roughness[0]) * rand(1, 1, 1)
    noise = torch.zeros(n, 3, size, size, device=gen.device)
    for octave in range(5):
        cells = max(2, round(2 ** (octave + 1) * size / 32))
        layer = nnf.interpolate(rand(3, cells, cells) - .5, size=(size, size), mode="bicubic", align_corners=False)
        noise = noise + fall ** octave * layer
    noise = noise / noise.std((1, 2, 3), keepdim=True)
    grey, tint = .05 + .65 * rand(1, 1, 1), .4 * (rand(3, 1, 1) - .5)
    mix = .8 + .2 * torch.eye(3, device=gen.device) + .6 * (rand(3, 3) - .5)  # channels of a photograph go together
    colour = torch.einsum("nij,njhw->nihw", mix, noise) * (.04 + .1 * rand(1, 1, 1)) + grey + tint
    ys, xs = torch.meshgrid(*[torch.linspace(-1, 1, size, device=gen.device)] * 2, indexing="ij")
    for _ in range(2):  # half-planes of another colour: edges as objects in a photograph make them
        angle, offset = 2 * np.pi * rand(1, 1, 1), 1.6 * rand(1, 1, 1) - .8
        side = ((torch.cos(angle) * xs + torch.sin(angle) * ys - offset) * size / 4).clamp(0, 1)
        colour = colour + side * (.5 * rand(1, 1, 1) - .25 + .4 * (rand(3, 1, 1) - .5))
    return colour.clamp(0, 1)


def _colours(n, gen, distance):
    """Two random colours (n,3,1,1) at least `distance` apart: the second is pushed away from the first."""
    first, step = torch.rand(2, n, 3, 1, 1, generator=gen, device=gen.device)
    step = step - .5
    step = step / torch.linalg.vector_norm(step, dim=1, keepdim=True) * (distance + .3 * torch.rand(
        n, 1, 1, 1, generator=gen, device=gen.device))
    second = first + step
    return first, torch.where((second < 0) | (second > 1), first - step, second).clamp(0, 1)


def look_source(digit, gen):
    """White on black, as written."""
    return digit.expand(-1, 3, -1, -1)


def look_difference(digit, gen):
    """|background - digit| over coloured textures: the recipe of MNIST-M."""
    return (textures(len(digit), digit.shape[-1], gen) - digit).abs()


def look_paint(digit, gen):
    """A digit of one random colour on a shaded ground of another; the ink is the brighter one in six of seven."""
    ink, paper = _colours(len(digit), gen, .5)
    swap = ink.mean(1, keepdim=True) < paper.mean(1, keepdim=True)
    swap = swap ^ (torch.rand(swap.shape, generator=gen, device=gen.device) < .15)
    ink, paper = torch.where(swap, paper, ink), torch.where(swap, ink, paper)
    shade = textures(len(digit), digit.shape[-1], gen, (.2, .4)) - .5
    return (digit * ink + (1 - digit) * (.6 * paper + .3 * shade)).clamp(0, 1)


def look_chalk(digit, gen):
    """Worn chalk on a board: uneven light, smears, grain, strokes with gaps."""
    n, size = len(digit), digit.shape[-1]
    def rand():
        return torch.rand(n, 1, 1, 1, generator=gen, device=gen.device)

    wear = torch.rand(digit.shape, generator=gen, device=gen.device)
    chalk = nnf.avg_pool2d(digit * (wear > .4 * rand()), 3, 1, 1) * 1.5
    light = textures(n, size, gen, (.3, .7)).mean(1, keepdim=True) - .5
    board = torch.rand(n, 3, 1, 1, generator=gen, device=gen.device) * .15 + .1 + .2 * rand() + .5 * light
    grain = torch.randn(digit.shape, generator=gen, device=gen.device) * (.02 + .1 * rand())
    return (board + (.45 + .4 * rand()) * chalk + grain).clamp(0, 1)


def look_stripes(digit, gen):
    """A coloured digit over stripes of two other colours."""
    n, size = len(digit), digit.shape[-1]
    ink, paper = _colours(n, gen, .5)
    angle, phase, width = torch.rand(3, n, 1, 1, 1, generator=gen, device=gen.device)
    ys, xs = torch.meshgrid(*[torch.arange(size, device=gen.device) * (32 / size)] * 2, indexing="ij")
    along = torch.cos(np.pi * angle) * xs + torch.sin(np.pi * angle) * ys
    stripe = (torch.sin(along * (.5 + .7 * width) + 6.3 * phase) * 2).clamp(-1, 1)
    return (torch.lerp(paper + .15 * stripe, ink, digit)).clamp(0, 1)


def look_glass(digit, gen):
    """A translucent digit: it brightens or darkens the texture that shows through."""
    scene = textures(len(digit), digit.shape[-1], gen, (.3, .7))
    strength = .45 + .3 * torch.rand(len(digit), 1, 1, 1, generator=gen, device=gen.device)
    target = (scene.mean((1, 2, 3), keepdim=True) < .5).float()  # towards white on dark scenes, else towards black
    return torch.lerp(scene, target.expand_as(scene), strength * digit)


LOOKS_UNSEEN = {"difference": look_difference, "paint": look_paint, "chalk": look_chalk}
LOOKS_DEV = {"stripes": look_stripes, "glass": look_glass}
LOOKS = {"source": look_source, **LOOKS_UNSEEN, **LOOKS_DEV}


def apply_look(name, digit, seed):
    """Colour images (B,3,H,W) in [0,1] of grey digits (B,1,H,W), white on black, in the named look."""
    gen = torch.Generator(digit.device).manual_seed(seed * len(LOOKS) + list(LOOKS).index(name))
    return torch.cat([LOOKS[name](part, gen) for part in digit.split(500)])
