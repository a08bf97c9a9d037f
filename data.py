"""Data: embedded procedural digits, and loaders for the real sets.

Everything embedded is drawn by ONE rasteriser, `draw_strokes`: the distance from every pixel to thick line segments.
Images are float (B,C,H,W) in [0,1] while they are made and uint8 once they are stored. Points are (x, y), x to the
right, y down, in pixels with the centre of the top-left pixel at (0, 0).

A *look* turns grey digits (white on black) into colour images of another domain. `source` is the training look;
`LOOKS_UNSEEN` are measured, `LOOKS_DEV` are there to choose settings on: no setting may be chosen on the former.
"""
import gzip
import hashlib
import math
import os
import struct
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
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
    strokes = strokes.to(device)
    variants = [[row for row, digit in enumerate(DIGITS) if digit[0] == c] for c in range(10)]
    variants = torch.tensor([[rows[0], rows[-1]] for rows in variants], device=device)
    images, labels = [], []
    for count in [min(500, n - i) for i in range(0, n, 500)]:
        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(count, *shape, generator=gen, device=device)

        label = torch.randint(10, (count,), generator=gen, device=device)
        row = variants[label, torch.randint(2, (count,), generator=gen, device=device)]
        p = strokes[row] - .5  # (n,2,P,2), centred
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


# ---------------------------------------------------------------- real digits

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MD5 = {"train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
             "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
             "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
             "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def download_mnist(folder):
    """Fetch the four files of MNIST that the folder lacks, each checked against its MD5.

    Raises ValueError: no network, or a file that is not the published one; nothing partial is left behind.
    """
    folder = Path(folder)
    for name, md5 in MNIST_MD5.items():
        target = folder / f"{name}.gz"
        if target.exists() or (folder / name).exists():
            continue
        try:
            with urllib.request.urlopen(MNIST_URL + target.name, timeout=60) as reply:
                content = reply.read()
        except (urllib.error.URLError, OSError) as error:
            raise ValueError(f"{MNIST_URL}{target.name}: cannot be fetched ({error}); "
                             f"put the four MNIST files into {folder} yourself and leave out --download") from None
        if hashlib.md5(content).hexdigest() != md5:
            raise ValueError(f"{MNIST_URL}{target.name}: checksum is not that of MNIST; get the file elsewhere")
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".part")
        partial.write_bytes(content)
        partial.replace(target)


def read_idx(folder, name, dims):
    """The array in the IDX file folder/name or folder/name.gz, uint8 with `dims` dimensions.

    Raises ValueError: missing, truncated, or not an IDX file of that kind.
    """
    path = next((p for p in (Path(folder) / name, Path(folder) / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise ValueError(f"{folder}: no {name} or {name}.gz; name a folder with the four MNIST files, or --download")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    header = 4 + 4 * dims
    if len(content) < header or content[:4] != bytes([0, 0, 8, dims]):
        raise ValueError(f"{path}: not an IDX file of bytes with {dims} dimensions; fetch it again")
    shape = struct.unpack(f">{dims}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{path}: holds {len(content) - header} bytes where its header says {math.prod(shape)}; "
                         f"it is truncated or damaged, fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def load_mnist(folder, split, size):
    """Images (N,1,size,size) float in [0,1] and labels (N,) int64 of MNIST's split, "train" or "t10k"."""
    images = read_idx(folder, f"{split}-images-idx3-ubyte", 3)
    labels = read_idx(folder, f"{split}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{folder}: {len(images)} {split} images but {len(labels)} labels; fetch the files again")
    if labels.max() > 9:
        raise ValueError(f"{folder}/{split}-labels-idx1-ubyte: label {labels.max()} of image {labels.argmax()} "
                         f"is outside 0-9; fetch the file again")
    images = torch.from_numpy(images.copy())[:, None]
    return torch.cat([resize(part, size) for part in images.split(2000)]), torch.from_numpy(labels.astype(np.int64))


def resize(images, size):
    """uint8 images (B,C,H,W) to float (B,C,size,size) in [0,1], as Pillow's antialiased bilinear resize does."""
    images = images.float() / 255
    if images.shape[-2:] == (size, size):
        return images
    return nnf.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


def to_uint8(images):
    """Images in [0,1] rounded to their 256 levels."""
    return (images * 255).round().to(torch.uint8)


def open_rgb(path):
    """The image file as an upright RGB PIL image. Raises ValueError that names a file which cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); remove or replace it") from None


def list_images(folder):
    """The image files of a folder, sorted. Raises ValueError if there are none."""
    files = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: no image files ({', '.join(sorted(IMAGE_SUFFIXES))}); name another folder")
    return files


def cached_images(files, size, cache):
    """The files as one read-only memory map (N,size,size,3) uint8, decoded in parallel once and kept in `cache`.

    The cache's name holds a hash of every path, length and time of change; an interrupted decoding leaves nothing.
    """
    stats = [(str(f.resolve()), s.st_size, s.st_mtime_ns) for f in files for s in [f.stat()]]
    target = Path(cache) / f"{hashlib.sha256(repr((size, stats)).encode()).hexdigest()[:16]}.npy"
    if not target.exists():
        made = not target.parent.exists()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.part")
        try:
            store = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(files), size, size, 3))

            def decode(i):
                store[i] = open_rgb(files[i]).resize((size, size), Image.Resampling.BILINEAR)

            with ThreadPoolExecutor() as pool:
                for _ in pool.map(decode, range(len(files))):
                    pass
            store.flush()
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            if made:
                target.parent.rmdir()
            raise
    return np.load(target, mmap_mode="r")


def load_mnist_m(folder, size, cache):
    """Images (N,3,size,size) uint8 and labels of MNIST-M in the release's layout; its test split if it is there.

    Raises ValueError: a label line that is not `name digit`, a label outside 0-9, an image missing or unreadable.
    """
    split = next((s for s in ("test", "train") if (Path(folder) / f"mnist_m_{s}").is_dir()), None)
    table = Path(folder) / f"mnist_m_{split}_labels.txt"
    if not table.exists():
        raise ValueError(f"{table}: missing; MNIST-M has a folder mnist_m_{split} and this list beside it")
    files, labels = [], []
    for number, line in enumerate(table.read_text().splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in "0123456789" or len(words[1]) != 1:
            raise ValueError(f"{table}, line {number}: {line[:60]!r} is not `name digit` with a digit 0-9; correct it")
        files.append(Path(folder) / f"mnist_m_{split}" / words[0])
        if not files[-1].is_file():
            raise ValueError(f"{files[-1]}: missing, named in {table}, line {number}; add it or remove the line")
        labels.append(int(words[1]))
    if not files:
        raise ValueError(f"{table}: empty; it needs a line `name digit` for each image")
    images = torch.from_numpy(np.array(cached_images(files, size, cache))).permute(0, 3, 1, 2)
    return images, torch.tensor(labels)


def make_mnist_m(digit, photos, seed):
    """|photograph - digit|: grey digits (B,1,S,S) over random S x S crops of a folder's photographs: (B,3,S,S)."""
    rng, size = np.random.default_rng(seed), digit.shape[-1]
    scenes = []
    for path in list_images(photos):
        scene = np.asarray(open_rgb(path))
        if min(scene.shape[:2]) < size:
            raise ValueError(f"{path}: {scene.shape[1]}x{scene.shape[0]} is smaller than a {size}x{size} crop; "
                             f"remove it")
        scenes.append(scene)
    crops = []
    for _ in range(len(digit)):
        scene = scenes[rng.integers(len(scenes))]
        top, left = (rng.integers(side - size + 1) for side in scene.shape[:2])
        crops.append(scene[top:top + size, left:left + size])
    return (torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255 - digit).abs()


def load_digits(data, unseen, size, count, seed, validate, cache):
    """The digit task: training images and labels, and the domains to measure on.

    data       "embedded" or a folder with MNIST
    unseen     folders: MNIST-M in the release's layout, or photographs (MNIST-M is then made from MNIST's test set)
    validate   measure on held-out training digits and the development looks: for choosing settings
    Returns train (N,3,S,S) uint8, labels (N,), and {domain: (images uint8, labels)}, "source" first.
    """
    if data == "embedded":
        digit, label = make_digits(count, size, 2 * seed)
        # The digits that are measured do not depend on the seed of the run.
        test_digit, test_label = make_digits(2000, size, 999_001 if validate else 999_002)
    else:
        if not Path(data).is_dir():
            raise ValueError(f"{data}: no such folder; --data takes a folder with the MNIST files, or add --download")
        digit, label = load_mnist(data, "train", size)
        if count + 2000 * validate > len(digit):
            raise ValueError(f"--train {count}: MNIST's training set has {len(digit)} digits, "
                             f"2,000 of them held out by --validate; ask for fewer")
        test_digit, test_label = (digit[-2000:], label[-2000:]) if validate else load_mnist(data, "t10k", size)
        digit, label = digit[:count], label[:count]
    domains = {"source": (to_uint8(apply_look("source", test_digit, 0)), test_label)}
    if validate or not unseen and data == "embedded":
        for name in LOOKS_DEV if validate else LOOKS_UNSEEN:
            domains[name] = (to_uint8(apply_look(name, test_digit, 7)), test_label)
    for folder in () if validate else unseen:
        name = Path(folder).resolve().name
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder; --unseen takes MNIST-M or a folder of photographs")
        if any((Path(folder) / f"mnist_m_{split}").is_dir() for split in ("train", "test")):
            domains[name] = load_mnist_m(folder, size, cache)
        else:
            domains[name] = (to_uint8(make_mnist_m(test_digit, folder, 0)), test_label)
    return to_uint8(apply_look("source", digit, 0)).contiguous(), label, domains
