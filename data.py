"""Data, embedded and real, as uint8 images (N,C,H,W). Points are (x, y) pixels, the first one (0, 0).

The embedded digits are drawn by `draw_strokes`: the distance from every pixel to thick line segments. A
*look* turns grey digits (white on black) into colour images of one domain. Networks train on `source`; UNSEEN
looks are measured at the end, DEV looks are there to choose settings on.
"""
import gzip
import hashlib
import math
import os
import struct
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageOps

import warp

# Control points x,y of the smooth strokes of a digit, in a box of side 100; some are written in two ways.
DIGITS = [
    (0, "50,08 20,22 16,55 30,88 62,92 82,60 78,25 50,08"),
    (1, "50,08 50,35 50,65 50,92"),
    (1, "34,26 44,18 53,08 / 53,08 53,50 53,92"),
    (2, "20,28 34,10 62,08 78,28 62,52 38,72 20,90 / 20,90 50,90 82,88"),
    (3, "22,16 50,07 74,20 66,42 44,48 / 44,48 72,54 80,74 60,92 22,86"),
    (4, "36,10 30,30 22,52 50,56 80,54 / 68,12 66,50 62,94"),
    (4, "62,08 40,34 18,62 50,64 84,62 / 62,08 62,50 62,94"),
    (5, "76,10 50,10 30,12 / 30,12 27,45 50,42 76,55 74,80 50,93 20,86"),
    (6, "66,08 38,26 22,58 28,86 54,93 76,76 64,55 40,56 25,72"),
    (7, "20,12 50,12 80,10 / 80,10 62,40 50,66 42,94"),
    (7, "20,12 50,12 80,10 62,40 50,66 42,94 / 36,52 55,50 74,50"),
    (8, "50,50 26,36 30,14 52,07 72,18 68,38 50,50 / 50,50 24,64 28,88 52,93 76,84 74,64 50,50"),
    (9, "74,28 60,09 34,12 24,34 42,50 66,44 74,28 / 74,28 72,60 64,94"),
]
CURVE_POINTS = 13  # points along a stroke: 12 straight segments look smooth at 32 pixels
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MD5 = {"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
             "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
             "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
             "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}

# ---------------------------------------------------------------- embedded digits

def _curve(text):
    """CURVE_POINTS points evenly spaced along the Catmull-Rom curve through the control points."""
    p = np.array([point.split(",") for point in text.split()], float) / 100
    p, t = np.concatenate([p[:1], p, p[-1:]]), np.linspace(0, 1, 12, endpoint=False)[:, None]
    dense = np.concatenate([b + t * (c - a) / 2 + t ** 2 * (a - 2.5 * b + 2 * c - d / 2)
                            + t ** 3 * (3 * b - a - 3 * c + d) / 2
                            for a, b, c, d in zip(p, p[1:], p[2:], p[3:])] + [p[-1:]])
    length = np.r_[0, np.cumsum(np.linalg.norm(np.diff(dense, axis=0), axis=1))]
    even = np.linspace(0, length[-1], CURVE_POINTS)
    return np.stack([np.interp(even, length, dense[:, i]) for i in (0, 1)], 1)

def draw_strokes(start, end, radius, size, softness=.7):
    """Coverage (B,1,H,W) of thick segments: max over them of (radius - distance)/softness + 1/2, in [0,1].
    start, end (B,S,2) and radius (B,S) in pixels; size (H,W)."""
    ys, xs = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    pixels = torch.stack([xs, ys], -1).to(start)[None]  # (1,H,W,2)
    cover = start.new_zeros(len(start), *size)
    for a, b, r in zip(start[:, :, None, None].unbind(1), end[:, :, None, None].unbind(1),
                       radius[:, :, None, None].unbind(1)):
        along = ((pixels - a) * (b - a)).sum(-1) / (b - a).square().sum(-1).clamp_min(1e-6)
        nearest = a + along.clamp(0, 1)[..., None] * (b - a)
        distance = torch.linalg.vector_norm(pixels - nearest, dim=-1)
        cover = torch.maximum(cover, ((r - distance) / softness + .5).clamp(0, 1))
    return cover[:, None]

def make_digits(n, size, seed, device="cpu"):
    """n grey digits (n,1,size,size) in [0,1], white on black, and labels (n,). Random: way of writing,
    control points, elastic waves, rotation, shear, scale, place, width of the stroke."""
    gen = torch.Generator(device).manual_seed(seed)
    # A digit of one stroke draws it twice, a digit written in one way has it twice: nothing changes.
    curves = [[_curve(strokes) for strokes in text.split("/")] for _, text in DIGITS]
    strokes = torch.tensor(np.array([[c[0], c[-1]] for c in curves]), dtype=torch.float32, device=device)
    ways = [[row for row, (digit, _) in enumerate(DIGITS) if digit == c] for c in range(10)]
    ways = torch.tensor([[rows[0], rows[-1]] for rows in ways], device=device)
    images, labels = [], []
    for count in [min(500, n - i) for i in range(0, n, 500)]:
        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(count, *shape, generator=gen, device=device)
        label = torch.randint(10, (count,), generator=gen, device=device)
        way = ways[label, torch.randint(2, (count,), generator=gen, device=device)]
        p = strokes[way] - .5  # (n,2,P,2), centred
        knots = uniform(-.07, .07, 4, 5)  # jittered control points, spread along the stroke
        p = p + nnf.interpolate(knots, size=CURVE_POINTS, mode="linear", align_corners=True) \
            .view(count, 2, 2, CURVE_POINTS).transpose(-1, -2)
        for frequency, amount in ((4, .05), (9, .025)):  # elastic: smooth waves that bend every stroke
            phase = uniform(0, 2 * np.pi, 1, 1, 2)
            p = p + amount * uniform(-1, 1, 1, 1, 2) * torch.sin(frequency * p.flip(-1) + phase)
        angle, shear = uniform(-.35, .35), uniform(-.35, .35)
        scale_x, scale_y = uniform(.4, .8), uniform(.5, .82)
        cos, sin = torch.cos(angle), torch.sin(angle)
        linear = torch.stack([scale_x * cos, scale_y * (shear * cos - sin),
                              scale_x * sin, scale_y * (shear * sin + cos)], -1).view(count, 1, 2, 2)
        p = (p @ linear.transpose(-1, -2) + .5 + uniform(-.07, .07, 1, 1, 2)) * size - .5
        radius = (uniform(.025, .06, 1) * size).expand(-1, 2 * CURVE_POINTS - 2)
        start, end = p[:, :, :-1].flatten(1, 2), p[:, :, 1:].flatten(1, 2)
        images.append(draw_strokes(start, end, radius, (size, size)))
        labels.append(label)
    return torch.cat(images), torch.cat(labels)

def uniform_noise(n, gen):
    """rand(*shape): uniform noise (n, *shape) in [0,1] from the generator."""
    return lambda *shape: torch.rand(n, *shape, generator=gen, device=gen.device)

def textures(n, size, gen, roughness=(.5, 1.)):
    """n natural-looking textures (n,3,size,size) in [0,1]: octaves of noise, mixed colours, a few edges."""
    rand = uniform_noise(n, gen)
    fall = roughness[0] + (roughness[1] - roughness[0]) * rand(1, 1, 1)
    noise = torch.zeros(n, 3, size, size, device=gen.device)
    for octave in range(5):
        cells = max(2, round(2 ** (octave + 1) * size / 32))
        layer = nnf.interpolate(rand(3, cells, cells) - .5, size=(size, size), mode="bicubic")
        noise += fall ** octave * layer
    noise = noise / noise.std((1, 2, 3), keepdim=True)
    grey, tint = .05 + .65 * rand(1, 1, 1), .4 * (rand(3, 1, 1) - .5)
    mix = .8 + .2 * torch.eye(3, device=gen.device) + .6 * (rand(3, 3) - .5)  # channels mostly go together
    colour = torch.einsum("nij,njhw->nihw", mix, noise) * (.04 + .1 * rand(1, 1, 1)) + grey + tint
    ys, xs = torch.meshgrid(*[torch.linspace(-1, 1, size, device=gen.device)] * 2, indexing="ij")
    for _ in range(2):  # half-planes of another colour: edges, as objects in a photograph make them
        angle, offset = 2 * np.pi * rand(1, 1, 1), 1.6 * rand(1, 1, 1) - .8
        side = ((torch.cos(angle) * xs + torch.sin(angle) * ys - offset) * size / 4).clamp(0, 1)
        colour = colour + side * (.5 * rand(1, 1, 1) - .25 + .4 * (rand(3, 1, 1) - .5))
    return colour.clamp(0, 1)

def two_colours(n, gen):
    """Two random colours (n,3,1,1), mostly 0.5 to 0.8 apart: the second is a step away from the first."""
    first, step = torch.rand(2, n, 3, 1, 1, generator=gen, device=gen.device)
    step = (step - .5) / torch.linalg.vector_norm(step - .5, dim=1, keepdim=True)
    step = step * (.5 + .3 * uniform_noise(n, gen)(1, 1, 1))
    second = first + step
    return first, torch.where((second < 0) | (second > 1), first - step, second).clamp(0, 1)

# A look maps grey digits (B,1,S,S) to colour images (B,3,S,S); all in [0,1], random by the generator.

def look_difference(digit, gen):
    """|background - digit| over coloured textures: the recipe of MNIST-M."""
    return (textures(len(digit), digit.shape[-1], gen) - digit).abs()

def look_paint(digit, gen):
    """A digit of one colour on a shaded ground of another; the ink is the brighter one in six of seven."""
    ink, paper = two_colours(len(digit), gen)
    swap = uniform_noise(len(digit), gen)(1, 1, 1) < .15
    swap = swap ^ (ink.mean(1, keepdim=True) < paper.mean(1, keepdim=True))
    ink, paper = torch.where(swap, paper, ink), torch.where(swap, ink, paper)
    shade = textures(len(digit), digit.shape[-1], gen, (.2, .4)) - .5
    return (digit * ink + (1 - digit) * (.6 * paper + .3 * shade)).clamp(0, 1)

def look_chalk(digit, gen):
    """Worn chalk on a board: uneven light, smears, grain, strokes with gaps."""
    rand = uniform_noise(len(digit), gen)
    wear = rand(*digit.shape[1:])
    chalk = 1.5 * nnf.avg_pool2d(digit * (wear > .4 * rand(1, 1, 1)), 3, 1, 1)
    light = textures(len(digit), digit.shape[-1], gen, (.3, .7)).mean(1, keepdim=True) - .5
    board = rand(3, 1, 1) * .15 + .1 + .2 * rand(1, 1, 1) + .5 * light
    grain = torch.randn(digit.shape, generator=gen, device=gen.device) * (.02 + .1 * rand(1, 1, 1))
    return (board + (.45 + .4 * rand(1, 1, 1)) * chalk + grain).clamp(0, 1)

def look_stripes(digit, gen):
    """A coloured digit over stripes in two shades of another colour."""
    ink, paper = two_colours(len(digit), gen)
    angle, phase, width = torch.rand(3, len(digit), 1, 1, 1, generator=gen, device=gen.device)
    axis = torch.arange(digit.shape[-1], device=gen.device) * (32 / digit.shape[-1])
    along = torch.cos(np.pi * angle) * axis + torch.sin(np.pi * angle) * axis[:, None]
    stripe = (torch.sin(along * (.5 + .7 * width) + 6.3 * phase) * 2).clamp(-1, 1)
    return torch.lerp(paper + .15 * stripe, ink, digit).clamp(0, 1)

def look_glass(digit, gen):
    """A translucent digit: it brightens a dark texture, or darkens a bright one, which shows through."""
    scene = textures(len(digit), digit.shape[-1], gen, (.3, .7))
    strength = .45 + .3 * uniform_noise(len(digit), gen)(1, 1, 1)
    target = (scene.mean((1, 2, 3), keepdim=True) < .5).float()
    return torch.lerp(scene, target.expand_as(scene), strength * digit)

LOOKS_UNSEEN = {"difference": look_difference, "paint": look_paint, "chalk": look_chalk}
LOOKS_DEV = {"stripes": look_stripes, "glass": look_glass}
LOOKS = {"source": lambda digit, gen: digit.expand(-1, 3, -1, -1), **LOOKS_UNSEEN, **LOOKS_DEV}

def apply_look(name, digit, seed):
    """The digits in the named look, as uint8 (B,3,S,S)."""
    gen = torch.Generator(digit.device).manual_seed(seed * len(LOOKS) + list(LOOKS).index(name))
    return torch.cat([to_uint8(LOOKS[name](part, gen)) for part in digit.split(500)])

# ---------------------------------------------------------------- embedded plants

def plant_scene(n, gen):
    """The objects of n random scenes, far to near, each a chain of thick segments, in a box of side 1: points
    (n,K,2), radius (n,K-1), depth (n,1,1), colour (n,3,1,1), heat (n,1,1,1), how many of its first points are
    landmarks (none: a mark on the object before it), whether it is on the plant."""
    rand = uniform_noise(n, gen)
    def between(low, high, *shape):
        return low + (high - low) * rand(*shape)
    def colour(*rgb):
        base = torch.tensor(rgb, device=gen.device).view(3, 1, 1)
        return (base * between(.6, 1.2, 1, 1, 1) + between(-.1, .1, 3, 1, 1)).clamp(0, 1)
    def chain(*points):
        return torch.stack([torch.stack(p, -1) for p in points], 1)
    for _ in range(5):  # stones on the ground
        x, y, depth = between(.05, .95), between(.68, .95), between(.1, .5, 1, 1)
        stone = chain((x, y), (x + between(-.03, .03), y + .01))
        yield stone, between(.03, .06, 1), depth, colour(.6, .55, .5), between(.45, .9, 1, 1, 1), 1, False
    for _ in range(4):  # labels with a line of writing
        x, y, wide, depth = between(.06, .94), between(.12, .75), between(.04, .06), between(0, .5, 1, 1)
        card, line = chain((x, y), (x + wide, y), (x - wide, y)), chain((x - wide / 2, y), (x + wide / 2, y))
        yield card, between(.03, .05, 2), depth, colour(.9, .9, .8), between(.6, 1, 1, 1, 1), 1, False
        yield line, between(.01, .014, 1), depth, colour(.1, .1, .2), between(0, .3, 1, 1, 1), 0, False
    x, y, wide, depth = between(.35, .65), between(.8, .9), between(.08, .14), between(.4, .6, 1, 1)
    clay, warm = colour(.7, .35, .2), between(.6, 1, 1, 1, 1)
    rim, body = chain((x - wide, y - .1), (x + wide, y - .1)), chain((x - .5 * wide, y), (x + .5 * wide, y))
    yield rim, between(.025, .04, 1), depth, clay, warm, 2, False
    yield body, between(.06, .07, 1), depth, .85 * clay, .9 * warm, 0, False
    top_x, top_y = x + between(-.12, .12), between(.3, .42)
    mid_x, mid_y = (x + top_x) / 2 + between(-.04, .04), (y + top_y) / 2
    stem = chain((top_x, top_y), (mid_x, mid_y), (x, y - .08))
    yield stem, between(.014, .024, 2), depth, colour(.4, .5, .2), between(.3, .5, 1, 1, 1), 2, True
    for i in range(8):  # leaves from tip to root, with a vein
        along, angle, length = rand(), between(-.4, math.pi + .4), between(.24, .45)
        root = torch.stack([torch.lerp(mid_x, top_x, along), torch.lerp(mid_y, top_y, along)], -1)[:, None]
        ahead = torch.stack([torch.cos(angle), -torch.sin(angle)], -1)[:, None] * length[:, None, None]
        sag = torch.tensor([0., 1.], device=gen.device) * (length * between(0, .5))[:, None, None]
        t = torch.tensor([1, .75, .5, .25, 0], device=gen.device)[:, None]
        leaf, wide = root + t * ahead + t ** 2 * sag, torch.tensor([.5, .95, 1, .6], device=gen.device)
        depth, green = .4 + .6 * (i + rand(1, 1)) / 8, colour(.25, .6, .2)
        yield leaf, between(.045, .08, 1) * wide, depth, green, between(.05, .3, 1, 1, 1), 4, True
        vein = between(.008, .012, 2)
        yield leaf[:, ::2], vein, depth, (green + .3).clamp(0, 1), between(.35, .6, 1, 1, 1), 0, True

def make_plants(n, size, seed, modality="ir", device="cpu"):
    """n random pairs: A (n,3,S,S) and B (n,1,S,S) uint8; landmarks (n,P,4), pixels x, y in A and in B, NaN if
    hidden; salient (P,): on the plant. B is seen through a smooth field and a parallax by depth."""
    gen = torch.Generator(device).manual_seed(seed)
    parts = []
    for count in [min(50, n - i) for i in range(0, n, 50)]:
        rand = uniform_noise(count, gen)
        bend = warp.random_field(count, (size, size), .06 * size, .05 * size, gen)
        parallax = torch.randn(count, 1, 2, generator=gen, device=device) * .05 * size
        ys = (torch.arange(size, device=device) + .5).view(-1, 1) / size
        floor = ((ys - .55 - .2 * rand(1, 1, 1)) * size).clamp(0, 1).expand(count, 1, size, size)
        field = bend + (parallax * -.5).transpose(1, 2)[..., None]
        views = []
        floor_b = warp.resample(floor, warp.invert(field), "border")
        for low, high, seen, channels in ((.2, .7, floor, 3), (.3, .6, floor_b, 1)):
            wall, ground = (low + (high - low) * rand(1, 1, 1) + .15 * (rand(channels, 1, 1) - .5)
                            for _ in range(2))
            stain = nnf.interpolate(rand(channels, 6, 6) - .5, size=(size, size), mode="bicubic")
            views.append(torch.lerp(wall, ground, seen) + .2 * stain)
        if modality == "depth":
            views[1] = .05 + .25 * ys + .05 * rand(1, 1, 1).expand(count, 1, size, size)
        owner, places, owners, salient = [torch.full((count, size, size), -1, device=device)] * 2, [], [], []
        for points, radius, depth, colour, heat, landmarks, on_plant in plant_scene(count, gen):
            a = points * size - .5
            seen = (a, a + warp.look_up(bend, a.transpose(1, 2)[..., None], "border")[..., 0].transpose(1, 2)
                    + parallax * (depth - .5))
            paint = (colour, heat if modality == "ir" else .2 + .75 * depth[..., None])
            number = owners[-1] + (landmarks > 0) if owners else 0
            for i, p in enumerate(seen):
                cover = draw_strokes(p[:, :-1], p[:, 1:], radius * size, (size, size))
                views[i] = torch.lerp(views[i], paint[i], cover)
                owner[i] = torch.where(cover[:, 0] > .5, number, owner[i])
            places.append(torch.stack(seen, 1)[:, :, :landmarks])  # (count,2,landmarks,2)
            owners += [number] * landmarks
            salient += [on_plant] * landmarks
        places = torch.cat(places, 2)
        pixel, index = places.round().long(), torch.arange(count, device=device)[:, None]
        visible, (x, y) = ((pixel >= 0) & (pixel < size)).all(-1).all(1), pixel.clamp(0, size - 1).unbind(-1)
        for i in (0, 1):
            visible &= owner[i][index, y[:, i], x[:, i]] == torch.tensor(owners, device=device)
        points = torch.where(visible[..., None], places.transpose(1, 2).flatten(2), torch.nan)
        grain = torch.randn(count, 4, size, size, generator=gen, device=device) * .02
        A, B = views[0] * (.8 + .4 * rand(1, 1, 1)) + grain[:, :3], views[1] + grain[:, 3:]
        parts.append((to_uint8(A.clamp(0, 1)), to_uint8(B.clamp(0, 1)), points))
    return *(torch.cat(part) for part in zip(*parts)), torch.tensor(salient)

def load_pairs(o):
    """What `make_plants` returns, {"train", "test"}; the test scenes are the same for all seeds."""
    counts = {"train": (o.train, 2 * o.seed), "test": (100, 999_001)}
    made = {split: make_plants(n, o.size, seed, o.modality) for split, (n, seed) in counts.items()}
    return {s: SimpleNamespace(A=A, B=B, points=points, salient=q) for s, (A, B, points, q) in made.items()}

# ---------------------------------------------------------------- image files

def open_image(path):
    """The file as an upright RGB picture; ValueError names a file that cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a readable image ({error}); replace it") from None

def as_tensor(image, size):
    """A picture as (3,size,size) uint8."""
    image = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
    return torch.from_numpy(image).permute(2, 0, 1)

def cached_images(files, size, cache):
    """The files as a memory map (N,3,size,size) uint8, decoded once, in parallel, into `cache`. Its name is a
    hash of every path, length and time of change. A decoding that fails leaves nothing behind."""
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr((size, stats)).encode()).hexdigest()[:16]
    target, is_new = Path(cache) / f"{key}.npy", not Path(cache).exists()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.part")
        try:
            store = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(files), 3, size, size))
            def decode(i):
                store[i] = as_tensor(open_image(files[i]), size)
            with ThreadPoolExecutor() as pool:
                list(pool.map(decode, range(len(files))))
            store.flush()
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            if is_new:
                target.parent.rmdir()
            raise
    return torch.from_numpy(np.load(target, mmap_mode="c"))

# ---------------------------------------------------------------- real digits

def to_uint8(images):
    """Images in [0,1] rounded to their 256 levels."""
    return (images * 255).round().to(torch.uint8)

def resize(images, size):
    """Images (B,C,H,W) in [0,1] at size x size, as Pillow does: antialiased bilinear, half-pixel centres."""
    if images.shape[-2:] == (size, size):
        return images
    return nnf.interpolate(images, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)

def download_mnist(folder):
    """Fetch the files of MNIST that the folder lacks, checked by MD5; ValueError if it cannot."""
    folder = Path(folder)
    for name, md5 in MNIST_MD5.items():
        if (folder / name).exists() or (folder / name).with_suffix("").exists():
            continue
        try:
            with urllib.request.urlopen(MNIST_URL + name, timeout=60) as reply:
                content = reply.read()
        except OSError as error:
            raise ValueError(f"{MNIST_URL}{name}: not to be had ({error}); put it into {folder}") from None
        if hashlib.md5(content).hexdigest() != md5:
            raise ValueError(f"{MNIST_URL}{name}: not the published file (MD5); fetch it elsewhere")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.part").write_bytes(content)
        (folder / f"{name}.part").replace(folder / name)

def read_idx(folder, name, dims):
    """The array of `dims` dimensions in folder/name or folder/name.gz. Raises ValueError if it is damaged."""
    path = next((p for p in (Path(folder) / name, Path(folder) / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise ValueError(f"{folder}: no {name}[.gz]; name a folder with the four MNIST files, or --download")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except UNREADABLE as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    start = 4 + 4 * dims
    if len(content) < start or content[:4] != bytes([0, 0, 8, dims]):
        raise ValueError(f"{path}: not an IDX file of bytes in {dims} dimensions; fetch it again")
    shape = struct.unpack(f">{dims}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path}: truncated or damaged, {len(content) - start} bytes instead of "
                         f"{math.prod(shape)}; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)

def load_mnist(folder, split, size):
    """Images (N,1,size,size) in [0,1], labels (N,) of MNIST's "train" or "t10k"; ValueError if damaged."""
    images = read_idx(folder, f"{split}-images-idx3-ubyte", 3)
    labels = read_idx(folder, f"{split}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{folder}: {len(images)} {split} images, {len(labels)} labels; fetch them again")
    if labels.max() > 9:
        raise ValueError(f"{folder}/{split}-labels-idx1-ubyte: label {labels.max()} of image "
                         f"{labels.argmax()} is outside 0-9; fetch the file again")
    parts = torch.from_numpy(images.copy())[:, None].split(2000)
    images = torch.cat([resize(part.float() / 255, size) for part in parts])
    return images, torch.from_numpy(labels.astype(np.int64))

def load_mnist_m(folder, size, cache):
    """Images (N,3,size,size) uint8 and labels of MNIST-M as released: its test split, else its train split.
    ValueError: no list of labels, a line that is not `name digit`, an image missing or unreadable."""
    split = next(s for s in ("test", "train") if (folder / f"mnist_m_{s}").is_dir())
    table, files, labels = folder / f"mnist_m_{split}_labels.txt", [], []
    if not table.exists():
        raise ValueError(f"{table}: missing; MNIST-M has this list beside the folder mnist_m_{split}")
    for number, line in enumerate(table.read_text().splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if not name or label not in list("0123456789"):
            raise ValueError(f"{table}, line {number}: {line[:60]!r} is not `name digit`, 0-9; correct it")
        files.append(folder / f"mnist_m_{split}" / name.strip())
        labels.append(int(label))
        if not files[-1].is_file():
            raise ValueError(f"{files[-1]}: missing; add it, or remove line {number} of {table}")
    if not files:
        raise ValueError(f"{table}: empty; it needs a line `name digit` for each image")
    return cached_images(files, size, cache), torch.tensor(labels)

def make_mnist_m(digit, photos, seed):
    """|photograph - digit| of grey digits (B,1,S,S) over random crops of photographs: (B,3,S,S)."""
    rng, size, crops = np.random.default_rng(seed), digit.shape[-1], []
    files = sorted(p for p in Path(photos).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{photos}: neither MNIST-M nor photographs ({', '.join(sorted(IMAGE_SUFFIXES))})")
    scenes = {file: np.asarray(open_image(file)) for file in files}
    for file, scene in scenes.items():
        if min(scene.shape[:2]) < size:
            raise ValueError(f"{file}: {scene.shape[1]}x{scene.shape[0]} is under {size}x{size}; remove it")
    scenes = list(scenes.values())
    for scene in rng.integers(len(scenes), size=len(digit)):
        top, left = (rng.integers(side - size + 1) for side in scenes[scene].shape[:2])
        crops.append(scenes[scene][top:top + size, left:left + size])
    return (torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255 - digit).abs()

def load_digits(o, cache):
    """Training images (N,3,S,S) uint8, their labels (N,), and {domain: (images, labels)} to measure. With
    o.validate these are held-out training digits and the development looks, to choose settings on."""
    for folder in [o.data] * (o.data != "embedded") + o.unseen:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder; --data takes one with MNIST (or add --download), "
                             f"--unseen takes MNIST-M or photographs")
    if o.validate and o.unseen:
        raise ValueError("--validate: measures on the development looks; leave out --unseen")
    if o.data == "embedded":  # the digits that are measured are the same for all seeds
        digit, label = make_digits(o.train, o.size, 2 * o.seed)
        test, test_label = make_digits(2000, o.size, 999_001 if o.validate else 999_002)
    else:
        digit, label = load_mnist(o.data, "train", o.size)
        if o.train + 2000 * o.validate > len(digit):
            raise ValueError(f"--train {o.train}: {o.data} has {len(digit)} training digits, of which "
                             f"--validate holds out 2,000; ask for fewer")
        held_out = digit[-2000:], label[-2000:]
        test, test_label = held_out if o.validate else load_mnist(o.data, "t10k", o.size)
        digit, label = digit[:o.train], label[:o.train]
    domains = {"source": (apply_look("source", test, 0), test_label)}
    for name in LOOKS_DEV if o.validate else LOOKS_UNSEEN if o.data == "embedded" and not o.unseen else ():
        domains[name] = (apply_look(name, test, 7), test_label)
    for folder in (Path(folder).resolve() for folder in o.unseen):
        if folder.name in domains:
            raise ValueError(f"{folder}: a second domain of that name; rename the folder")
        real = any((folder / f"mnist_m_{split}").is_dir() for split in ("train", "test"))
        made = None if real else (to_uint8(make_mnist_m(test, folder, 0)), test_label)
        domains[folder.name] = made or load_mnist_m(folder, o.size, cache)
    return apply_look(o.look, digit, 0), label, domains
