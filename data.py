"""Data, embedded and real, as uint8 images (N,C,H,W). Points are (x, y) pixels, the first one (0, 0).

The embedded data are drawn by `draw_strokes`. A *look* turns grey digits (white on black) into colour images
of one domain: networks train on `source`, UNSEEN looks are measured at the end, DEV looks choose settings.
A file that is bad raises ValueError, which names it, the line, and the remedy.
"""
import gzip, hashlib, math, os, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageOps
import warp

DIGITS = [  # control points x,y of the one or two smooth strokes of each digit, in a box of side 100
    "50,08 20,22 16,55 30,88 62,92 82,60 78,25 50,08",
    "34,26 44,18 53,08 / 53,08 53,50 53,92",
    "20,28 34,10 62,08 78,28 62,52 38,72 20,90 / 20,90 50,90 82,88",
    "22,16 50,07 74,20 66,42 44,48 / 44,48 72,54 80,74 60,92 22,86",
    "36,10 30,30 22,52 50,56 80,54 / 68,12 66,50 62,94",
    "76,10 50,10 30,12 / 30,12 27,45 50,42 76,55 74,80 50,93 20,86",
    "66,08 38,26 22,58 28,86 54,93 76,76 64,55 40,56 25,72",
    "20,12 50,12 80,10 / 80,10 62,40 50,66 42,94",
    "50,50 26,36 30,14 52,07 72,18 68,38 50,50 / 50,50 24,64 28,88 52,93 76,84 74,64 50,50",
    "74,28 60,09 34,12 24,34 42,50 66,44 74,28 / 74,28 72,60 64,94"]
CURVE_POINTS = 13  # points along a stroke: 12 straight segments look smooth at 32 pixels
MISALIGNED = .075, .03  # bend and shift of the embedded plants, in `warp.random_field`
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}

# ---------------------------------------------------------------- embedded digits
def _curve(text):
    """CURVE_POINTS points along the control points, straight from one to the next, then smoothed."""
    p = np.array([point.split(",") for point in text.split()], float) / 100
    p = np.stack([np.interp(np.linspace(0, len(p) - 1, CURVE_POINTS), range(len(p)), c) for c in p.T], 1)
    for _ in range(2):
        p[1:-1] = (p[:-2] + 2 * p[1:-1] + p[2:]) / 4
    return p

def draw_strokes(start, end, radius, size, softness=.7):
    """Coverage (B,1,H,W) of thick segments: max over them of (radius - distance)/softness + 1/2, in [0,1].
    start, end (B,S,2) and radius (B,S) in pixels; size (H,W)."""
    ys, xs = (torch.arange(side).to(start) for side in size)
    cover = start.new_zeros(len(start), *size)
    for a, b, r in zip(start.unbind(1), end.unbind(1), radius[..., None, None].unbind(1)):
        (a_x, a_y), (d_x, d_y) = (p[..., None, None].unbind(1) for p in (a, b - a))
        x, y = xs - a_x, ys[:, None] - a_y  # (B,1,W) and (B,H,1): no (B,H,W,2) is ever made
        along = ((x * d_x + y * d_y) / (d_x * d_x + d_y * d_y).clamp_min(1e-6)).clamp(0, 1)
        distance = ((x - along * d_x).square() + (y - along * d_y).square()).sqrt()
        cover = torch.maximum(cover, (r - distance) / softness + .5)
    return cover.clamp(0, 1)[:, None]

def make_digits(n, size, seed):
    """n grey digits (n,1,size,size) in [0,1], white on black, and labels (n,). Random: waves that bend the
    strokes, an affine map, place, width of the stroke."""
    gen = torch.Generator().manual_seed(seed)
    curves = [[_curve(stroke) for stroke in text.split("/")] for text in DIGITS]  # one counts twice
    strokes = torch.tensor(np.array([[c[0], c[-1]] for c in curves]), dtype=torch.float32) - .5
    images, labels = [], []
    for count in [min(500, n - i) for i in range(0, n, 500)]:
        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(count, *shape, generator=gen)
        labels.append(torch.randint(10, (count,), generator=gen))
        p = strokes[labels[-1]]  # (n,2,P,2), centred
        for frequency, amount in ((4, .08), (9, .04)):
            phase = uniform(0, 2 * np.pi, 1, 1, 2)
            p = p + amount * uniform(-1, 1, 1, 1, 2) * torch.sin(frequency * p.flip(-1) + phase)
        linear = torch.diag_embed(uniform(.45, .8, 1, 2)) + uniform(-.2, .2, 1, 2, 2)
        p = (p @ linear + .5 + uniform(-.07, .07, 1, 1, 2)) * size - .5
        radius = (uniform(.025, .06, 1) * size).expand(-1, 2 * CURVE_POINTS - 2)
        start, end = p[:, :, :-1].flatten(1, 2), p[:, :, 1:].flatten(1, 2)
        images.append(draw_strokes(start, end, radius, (size, size)))
    return torch.cat(images), torch.cat(labels)

def uniform_noise(n, gen):
    """rand(*shape): uniform noise (n, *shape) in [0,1] from the generator."""
    return lambda *shape: torch.rand(n, *shape, generator=gen, device=gen.device)

def textures(n, size, gen, roughness=(.5, 1.)):
    """n natural-looking textures (n,3,size,size) in [0,1]: octaves of noise, mixed colours, a few edges."""
    rand = uniform_noise(n, gen)
    fall = roughness[0] + (roughness[1] - roughness[0]) * rand(1, 1, 1)
    noise = torch.zeros(n, 3, size, size)
    for octave in range(5):
        cells = max(2, round(2 ** (octave + 1) * size / 32))
        layer = nnf.interpolate(rand(3, cells, cells) - .5, size=(size, size), mode="bicubic")
        noise += fall ** octave * layer
    noise = noise / noise.std((1, 2, 3), keepdim=True)
    grey, tint = .05 + .65 * rand(1, 1, 1), .4 * (rand(3, 1, 1) - .5)
    mix = .8 + .2 * torch.eye(3) + .6 * (rand(3, 3) - .5)  # channels mostly go together
    colour = torch.einsum("nij,njhw->nihw", mix, noise) * (.04 + .1 * rand(1, 1, 1)) + grey + tint
    ys, xs = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    for _ in range(2):  # half-planes of another colour: edges, as objects in a photograph make them
        angle, offset = 2 * np.pi * rand(1, 1, 1), 1.6 * rand(1, 1, 1) - .8
        side = ((torch.cos(angle) * xs + torch.sin(angle) * ys - offset) * size / 4).clamp(0, 1)
        colour = colour + side * (.5 * rand(1, 1, 1) - .25 + .4 * (rand(3, 1, 1) - .5))
    return colour.clamp(0, 1)

def two_colours(rand):
    """Two random colours (n,3,1,1), mostly 0.5 to 0.8 apart: the second is a step away from the first."""
    first, step = rand(3, 1, 1), rand(3, 1, 1) - .5
    step = step * (.5 + .3 * rand(1, 1, 1)) / torch.linalg.vector_norm(step, dim=1, keepdim=True)
    second = first + step
    return first, torch.where((second < 0) | (second > 1), first - step, second).clamp(0, 1)

# A look maps grey digits (B,1,S,S) to colour images (B,3,S,S) in [0,1]; rand(*shape) is noise (B, *shape) in
# [0,1], scene(roughness) are textures of the digits' size.

def look_difference(digit, rand, scene):
    """|background - digit| over coloured textures: the recipe of MNIST-M."""
    return (scene() - digit).abs()

def look_paint(digit, rand, scene):
    """A digit of one colour on a shaded ground of another; the ink is the brighter one in six of seven."""
    ink, paper = two_colours(rand)
    swap = (rand(1, 1, 1) < .15) ^ (ink.mean(1, keepdim=True) < paper.mean(1, keepdim=True))
    ink, paper = torch.where(swap, paper, ink), torch.where(swap, ink, paper)
    return (digit * ink + (1 - digit) * (.6 * paper + .3 * scene((.2, .4)) - .15)).clamp(0, 1)

def look_chalk(digit, rand, scene):
    """Worn chalk on a board: uneven light, smears, grain, strokes with gaps."""
    chalk = 1.5 * nnf.avg_pool2d(digit * (rand(*digit.shape[1:]) > .4 * rand(1, 1, 1)), 3, 1, 1)
    light = scene((.3, .7)).mean(1, keepdim=True) - .5
    board = rand(3, 1, 1) * .15 + .1 + .2 * rand(1, 1, 1) + .5 * light
    grain = 3.5 * (rand(*digit.shape[1:]) - .5) * (.02 + .1 * rand(1, 1, 1))
    return (board + (.45 + .4 * rand(1, 1, 1)) * chalk + grain).clamp(0, 1)

def look_stripes(digit, rand, scene):
    """A coloured digit over stripes in two shades of another colour."""
    (ink, paper), angle = two_colours(rand), np.pi * rand(1, 1, 1)
    axis = torch.arange(digit.shape[-1]) * (32 / digit.shape[-1])
    along = torch.cos(angle) * axis + torch.sin(angle) * axis[:, None]
    stripe = (torch.sin(along * (.5 + .7 * rand(1, 1, 1)) + 6.3 * rand(1, 1, 1)) * 2).clamp(-1, 1)
    return torch.lerp(paper + .15 * stripe, ink, digit).clamp(0, 1)

def look_glass(digit, rand, scene):
    """A translucent digit: it brightens a dark texture, or darkens a bright one, which shows through."""
    behind, strength = scene((.3, .7)), .45 + .3 * rand(1, 1, 1)
    return torch.lerp(behind, (behind.mean((1, 2, 3), keepdim=True) < .5).float(), strength * digit)

LOOKS_UNSEEN = {"difference": look_difference, "paint": look_paint, "chalk": look_chalk}
LOOKS_DEV = {"stripes": look_stripes, "glass": look_glass}
LOOKS = {"source": lambda digit, *_: digit.expand(-1, 3, -1, -1), **LOOKS_UNSEEN, **LOOKS_DEV}

def apply_look(name, digit, seed):
    """The digits in the named look, as uint8 (B,3,S,S)."""
    gen = torch.Generator().manual_seed(seed * len(LOOKS) + list(LOOKS).index(name))
    def seen(part):
        def scene(*roughness):
            return textures(len(part), digit.shape[-1], gen, *roughness)
        return to_uint8(LOOKS[name](part, uniform_noise(len(part), gen), scene))
    return torch.cat([seen(part) for part in digit.split(500)])

# ---------------------------------------------------------------- embedded plants
def plant_scene(n, gen):
    """The objects of n random scenes, far to near, each a chain of thick segments, in a box of side 1: points
    (n,K,2), radius (n,K-1), depth (n,1,1), colour (n,3,1,1), heat (n,1,1,1), how many of its first points are
    landmarks (none: a mark on the object before it), whether it is on the plant."""
    rand = uniform_noise(n, gen)
    def between(low, high, *shape):
        return low + (high - low) * rand(*shape)
    def colour(*rgb):
        base = torch.tensor(rgb).view(3, 1, 1)
        return (base * between(.6, 1.2, 1, 1, 1) + between(-.1, .1, 3, 1, 1)).clamp(0, 1)
    def chain(*points):
        return torch.stack([torch.stack(p, -1) for p in points], 1)
    horizon, far = between(.55, .75), between(0, .2, 1, 1)
    ground = chain(*((x * torch.ones_like(horizon), horizon + .5) for x in (-.2, .2, .6, 1., 1.4)))
    yield ground, .5 * torch.ones(1, 4).to(far), far, colour(.5, .4, .3), between(.3, .6, 1, 1, 1), 0, False
    for _ in range(5):  # stones on the ground
        x, y = between(.05, .95), between(.68, .95)
        stone = chain((x, y), (x + between(-.03, .03), y + .01))
        look = between(.1, .5, 1, 1), colour(.6, .55, .5), between(.45, .9, 1, 1, 1)
        yield stone, between(.03, .06, 1), *look, 1, False
    for _ in range(4):  # labels with a line of writing
        x, y, depth = between(.06, .94), between(.12, .75), between(0, .5, 1, 1)
        card, line = (chain((x, y), (x + wide, y), (x - wide, y)) for wide in (.05, .025))
        yield card, between(.03, .05, 2), depth, colour(.9, .9, .8), between(.6, 1, 1, 1, 1), 1, False
        yield line, between(.01, .014, 2), depth, colour(.1, .1, .2), between(0, .3, 1, 1, 1), 0, False
    x, y, wide, depth = between(.35, .65), between(.8, .9), between(.08, .14), between(.4, .6, 1, 1)
    clay, warm = colour(.7, .35, .2), between(.6, 1, 1, 1, 1)
    rim, body = (chain((x - w, y - up), (x + w, y - up)) for w, up in ((wide, .1), (.5 * wide, 0)))
    yield rim, between(.025, .04, 1), depth, clay, warm, 2, False
    yield body, between(.06, .07, 1), depth, .85 * clay, .9 * warm, 0, False
    top_x, top_y = x + between(-.12, .12), between(.3, .42)
    mid_x, mid_y = (x + top_x) / 2 + between(-.04, .04), (y + top_y) / 2
    stem = chain((top_x, top_y), (mid_x, mid_y), (x, y - .08))
    yield stem, between(.014, .024, 2), depth, colour(.4, .5, .2), between(.3, .5, 1, 1, 1), 2, True
    for i in range(8):  # leaves from tip to root; a pale vein ends where landmarks are
        along, angle, length = rand(), between(-.4, math.pi + .4), between(.24, .45)
        root = torch.stack([torch.lerp(mid_x, top_x, along), torch.lerp(mid_y, top_y, along)], -1)[:, None]
        ahead = torch.stack([torch.cos(angle), -torch.sin(angle)], -1)[:, None] * length[:, None, None]
        sag = torch.tensor([0., 1.]) * (length * between(0, .5))[:, None, None]
        t = torch.tensor([1, .75, .5, .25, 0])[:, None]
        leaf, wide = root + t * ahead + t ** 2 * sag, torch.tensor([.5, .95, 1, .6])
        depth, green = .4 + .6 * (i + rand(1, 1)) / 8, colour(.25, .6, .2)
        yield leaf, between(.045, .08, 1) * wide, depth, green, between(.05, .3, 1, 1, 1), 4, True
        pale, warm = (green + .35).clamp(0, 1), between(.4, .7, 1, 1, 1)
        yield leaf[:, 1:4], between(.01, .014, 2), depth, pale, warm, 0, True

def make_plants(n, size, seed, modality="ir"):
    """n random pairs of size (H,W): A (n,3,H,W), B (n,1,H,W) uint8; landmarks (n,P,4), pixels x, y in A, then
    B, NaN if hidden; salient (P,): on the plant. B is seen through a smooth field and a parallax by depth."""
    gen, sides = torch.Generator().manual_seed(seed), torch.tensor(size[::-1])
    parts = []
    for count in [min(50, n - i) for i in range(0, n, 50)]:
        rand = uniform_noise(count, gen)
        bend = warp.random_field(count, size, *MISALIGNED, gen)
        parallax = torch.randn(count, 1, 2, generator=gen) * .05 * sides
        wall = .3 if modality == "ir" else 0.  # cooler than pots and warmer than leaves; or far away
        views = [base + .3 * rand(1, 1, 1) + .2 * nnf.interpolate(rand(c, 6, 6) - .5, size, mode="bicubic")
                 for base, c in ((.3, 3), (wall, 1))]
        owner, places, owners, salient = [torch.zeros(count, 1, *size)] * 2, [], [0], []
        for points, radius, depth, colour, heat, landmarks, on_plant in plant_scene(count, gen):
            a = points * sides - .5
            moved = warp.look_up(bend, a.transpose(1, 2)[..., None], "border")[..., 0].transpose(1, 2)
            seen = a, a + moved + parallax * (depth - .5)
            paint = colour, heat if modality == "ir" else .2 + .75 * depth[..., None]
            number = owners[-1] + (landmarks > 0)
            for i, p in enumerate(seen):
                cover = draw_strokes(p[:, :-1], p[:, 1:], radius * min(size), size)
                views[i] = torch.lerp(views[i], paint[i], cover)
                owner[i] = torch.where(cover > .5, number, owner[i])
            places.append(torch.stack(seen, 1)[:, :, :landmarks])  # (count,2,landmarks,2)
            owners += [number] * landmarks
            salient += [on_plant] * landmarks
        places, owners = torch.cat(places, 2), torch.tensor(owners[1:])
        seen = [warp.look_up(owner[i], places[:, i].round().transpose(1, 2)[..., None]) for i in (0, 1)]
        visible = (torch.cat(seen, 1)[..., 0].round() == owners).all(1)
        points = torch.where(visible[..., None], places.transpose(1, 2).flatten(2), torch.nan)
        A, B = (view + .02 * torch.randn(view.shape, generator=gen) for view in views)
        parts.append((to_uint8((A * (.8 + .4 * rand(1, 1, 1))).clamp(0, 1)), to_uint8(B.clamp(0, 1)), points))
    return *(torch.cat(part) for part in zip(*parts)), torch.tensor(salient)

# ---------------------------------------------------------------- image files
def open_image(path, channels=3, low=0., high=65535.):
    """The file as an upright RGB (or grey) picture of 8 bits; deeper ones are stretched from [low, high]."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":
                stretched = (np.asarray(image, np.float32) - low) / max(high - low, 1e-6)
                image = Image.fromarray((255 * stretched.clip(0, 1)).round().astype(np.uint8))
            return image.convert("RGB" if channels == 3 else "L")
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a readable image ({error}); replace it") from None

def as_tensor(image, size):
    """A picture as (C,H,W) uint8 of size (H,W)."""
    image = np.array(image.resize(size[::-1], Image.Resampling.BILINEAR))
    return torch.from_numpy(image.reshape(*size, -1)).permute(2, 0, 1)

def list_images(folder):
    """{stem: path} of the images in a folder, sorted. ValueError if there is none."""
    files = [p for p in sorted(folder.glob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    if not files or len(files) != len({p.stem for p in files}):
        raise ValueError(f"{folder}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}) or two of one name")
    return {p.stem: p for p in files}

def cached_images(files, size, cache, reading=(3, 0., 65535.)):
    """The files as a memory map (N,C,H,W) uint8, decoded once, in parallel, into `cache`. Its name is a hash
    of every path, length and time of change. A decoding that fails leaves nothing behind."""
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr((size, reading, stats)).encode()).hexdigest()[:16]
    target, is_new = Path(cache) / f"{key}.npy", not Path(cache).exists()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.part")
        try:
            store = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(files), reading[0], *size))
            def decode(i):
                store[i] = as_tensor(open_image(files[i], *reading), size)
            with ThreadPoolExecutor() as pool:
                list(pool.map(decode, range(len(files))))
            store.flush()
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            if is_new and not list(target.parent.iterdir()):
                target.parent.rmdir()
            raise
    return torch.from_numpy(np.load(target, mmap_mode="c"))

# ---------------------------------------------------------------- pairs of images
def inspect(files):
    """What the headers say: sizes (N,2) as width, height, and the last arguments of `open_image`: 3 channels
    if a file has colours, the .5 and 99.5 percentiles of the pixels of files deeper than 8 bits."""
    sizes, channels, deep = [], 1, [np.array([0, 65535])]
    for path in files:
        try:
            with Image.open(path) as image:
                turned = image.getexif().get(274, 1) >= 5  # EXIF orientations that swap width and height
                sizes.append(image.size[::-1] if turned else image.size)
                channels = channels if image.mode[0] in "1LIF" else 3
                if image.mode[0] in "IF":
                    deep.append(np.asarray(image, np.float32).ravel()[::97])
        except UNREADABLE as error:
            raise ValueError(f"{path}: not a readable image ({error}); replace it") from None
    return np.array(sizes), (channels, *np.percentile(np.concatenate(deep[1:] or deep), (.5, 99.5)).tolist())

def read_landmarks(table, columns, sizes):
    """{stem: rows} of a csv `name,columns`: pixel coordinates as shares of sizes {stem: (width, ...)}."""
    found, lines = {stem: [] for stem in sizes}, table.read_text().splitlines()
    if len(lines) < 2 or lines[0].replace(" ", "") != f"name,{columns}":
        raise ValueError(f"{table}: its first line must be name,{columns}, then a line per point; correct it")
    for number, line in enumerate(lines[1:], 2):
        name, *words = line.split(",")
        try:
            stem = name.strip() if name.strip() in sizes else Path(name.strip()).stem
            size = sizes[stem]
            place = np.array(words, np.float64).reshape(len(size))
            if not ((place >= -1) & (place <= size)).all():
                raise ValueError
        except (KeyError, ValueError):
            raise ValueError(f"{table}, line {number}: {line[:60]!r} needs an image of this folder and "
                             f"{columns}, points inside it; correct it") from None
        found[stem].append((place + .5) / size)
    return found

def load_pairs(o, cache, reading=None):
    """{"train", "test": pairs} and how files are read (None: find out). Pairs: A, B (N,C,H,W) uint8; points
    and salient of `make_plants`, or None. Embedded test scenes know no seed; without test/ it is train/."""
    folder, size, pairs = Path(o.data), (o.height, o.width), {}
    for split, n, seed in (("train", o.train, 2 * o.seed), ("test", 100, 999_003)):
        if o.data == "embedded":
            made = make_plants(n, size, seed, o.modality)
            pairs[split] = SimpleNamespace(**dict(zip(("A", "B", "points", "salient"), made)))
            continue
        there = folder / (split if (folder / split).is_dir() else "train")
        files = {side: list_images(there / side) for side in "AB"}
        for stem in files["A"].keys() ^ files["B"].keys():
            lonely = files["A"].get(stem) or files["B"][stem]
            raise ValueError(f"{lonely}: no partner of that name on the other side; add or remove one")
        files = {side: [files[side][stem] for stem in files["A"]] for side in "AB"}
        seen, points = {side: inspect(files[side]) for side in "AB"}, None
        reading = reading or {side: how for side, (_, how) in seen.items()}
        if (there / "landmarks.csv").exists():
            sizes = dict(zip([f.stem for f in files["A"]], np.hstack([seen["A"][0], seen["B"][0]])))
            rows = read_landmarks(there / "landmarks.csv", "xa,ya,xb,yb", sizes).values()
            rows = [torch.tensor(np.reshape(row, (-1, 4)) * (size[::-1] * 2) - .5) for row in rows]
            points = torch.nn.utils.rnn.pad_sequence(rows, True, torch.nan).float()
        images = {side: cached_images(files[side], size, cache, reading[side]) for side in "AB"}
        pairs[split] = SimpleNamespace(**images, points=points, salient=None)
    return pairs, reading or {"A": (3, 0., 65535.), "B": (1, 0., 65535.)}

def augment(I_a, I_b, crop, deform, gen):
    """A batch of pairs seen otherwise: both flipped or not, the same crop of both, A through one more field.
    That is honest for unaligned pairs: what both undergo keeps their relation, the field adds to it."""
    rand = uniform_noise(len(I_a), gen)
    flip = rand(1, 1, 1) < .5
    I_a, I_b = (torch.where(flip, I.flip(3), I) for I in (I_a, I_b))
    if crop:
        v = warp.grid_of(I_a)
        field = crop * rand(1, 1, 1) * (rand(2, 1, 1) * v[..., -1:, -1:] - v)  # zooms in on a place inside
        I_a, I_b = (warp.resample(I, field, "border") for I in (I_a, I_b))
    if deform:
        I_a = warp.resample(I_a, warp.random_field(len(I_a), I_a.shape[-2:], deform, 0, gen), "border")
    return I_a, I_b

# ---------------------------------------------------------------- real digits
def to_uint8(images):
    """Images in [0,1] rounded to their 256 levels."""
    return (images * 255).round().to(torch.uint8)

def read_idx(folder, name, dims):
    """The array of `dims` dimensions in folder/name or folder/name.gz. Raises ValueError if it is damaged."""
    path = next((p for p in (Path(folder) / name, Path(folder) / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise ValueError(f"{folder}: no {name}[.gz]; name a folder with the four MNIST files (see README)")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        kind, *shape = np.frombuffer(content, ">i4", 1 + dims)
        if kind != 0x800 + dims:
            raise ValueError(f"it does not hold bytes in {dims} dimensions")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except UNREADABLE as error:
        raise ValueError(f"{path}: damaged, or not such an IDX file ({error}); fetch it again") from None

def load_mnist(folder, split, size):
    """Images (N,1,size,size) in [0,1], labels (N,) of MNIST's "train" or "t10k"; ValueError if damaged."""
    images = read_idx(folder, f"{split}-images-idx3-ubyte", 3)
    labels = read_idx(folder, f"{split}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or not len(images) or labels.max() > 9:
        raise ValueError(f"{folder}: {split} has {len(images)} images, and {len(labels)} labels up to "
                         f"{labels.max(initial=0)}, which must be 0-9; fetch the files again")
    parts = torch.from_numpy(images.copy())[:, None].split(2000)
    images = [nnf.interpolate(part / 255, (size, size), mode="bilinear", antialias=True) for part in parts]
    return torch.cat(images).clamp(0, 1), torch.from_numpy(labels.astype(np.int64))

def load_mnist_m(folder, size, cache):
    """Images (N,3,size,size) uint8 and labels of MNIST-M as released: the test split if it is there."""
    split = next(s for s in ("test", "train") if (folder / f"mnist_m_{s}").is_dir())
    table, files, labels = folder / f"mnist_m_{split}_labels.txt", [], []
    for number, line in enumerate(table.read_text().splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        files.append(folder / f"mnist_m_{split}" / name.strip())
        if label not in list("0123456789") or not files[-1].is_file():
            raise ValueError(f"{table}, line {number}: {line[:60]!r} is not `name digit` of an image in "
                             f"{files[-1].parent}; correct it")
        labels.append(int(label))
    if not files:
        raise ValueError(f"{table}: empty; it needs a line `name digit` for each image")
    return cached_images(files, (size, size), cache), torch.tensor(labels)

def make_mnist_m(digit, photos, seed):
    """|photograph - digit| of grey digits (B,1,S,S) over random crops of photographs: (B,3,S,S)."""
    rng, size = np.random.default_rng(seed), digit.shape[-1]
    scenes = [open_image(file) for file in list_images(photos).values()]
    def crop(scene):
        left, top = (rng.integers(max(1, side - size + 1)) for side in scene.size)
        return as_tensor(scene.crop((left, top, left + size, top + size)), (size, size))
    crops = [crop(scenes[i]) for i in rng.integers(len(scenes), size=len(digit))]
    return (torch.stack(crops) / 255 - digit).abs()

def load_digits(o, cache):
    """Training images (N,3,S,S) uint8, their labels (N,), and {domain: (images, labels)} to measure. With
    o.validate these are held-out training digits and the development looks, to choose settings on."""
    if o.data == "embedded":  # the digits that are measured are the same for all seeds
        digit, label = make_digits(o.train, o.size, 2 * o.seed)
        test = make_digits(2000, o.size, 999_001 if o.validate else 999_002)
    else:
        digit, label = load_mnist(o.data, "train", o.size)
        if o.train + 2000 * o.validate > len(digit):
            raise ValueError(f"--train {o.train}: more than the training digits in {o.data}; ask for fewer")
        test = (digit[-2000:], label[-2000:]) if o.validate else load_mnist(o.data, "t10k", o.size)
        digit, label = digit[:o.train], label[:o.train]
    domains = {"source": (apply_look("source", test[0], 0), test[1])}
    for name in LOOKS_DEV if o.validate else LOOKS_UNSEEN if o.data == "embedded" and not o.unseen else ():
        domains[name] = (apply_look(name, test[0], 7), test[1])
    for folder in (Path(folder).resolve() for folder in o.unseen):
        if folder.name in domains or o.validate:
            raise ValueError(f"{folder}: a second domain of its name, or with --validate; leave it out")
        real = any((folder / f"mnist_m_{split}").is_dir() for split in ("train", "test"))
        made = None if real else (to_uint8(make_mnist_m(test[0], folder, 0)), test[1])
        domains[folder.name] = made or load_mnist_m(folder, o.size, cache)
    return apply_look(o.look, digit, 0), label, domains
