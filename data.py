"""Data: digits, hands and plants drawn with Pillow from a seed alone, and readers of a user's own files.
Images are uint8 (N, C, H, W). Points are (x, y), x right and y down: in pixels, where the centre of the
top-left pixel is (0, 0), or in shares of the sides, (pixel + 0.5) / side."""
import csv
import gzip
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import cos, pi, sin
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

import warp

HAND_COLUMNS = [f"{axis}{i}" for i in range(17) for axis in "xy"]  # of landmarks.csv
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
Image.MAX_IMAGE_PIXELS = None  # `open_image` has the same limit, but Pillow calls a larger one an attack
TEST_SEED = 999_003  # the digits, hands and scenes that are measured are the same for every --seed
BEND, SHIFT = 0.088, 0.02  # how plants are misaligned: at 3x3 knots, and as a whole; in shares of the sides
RADII = (0.10, 0.10, 0.10, 0.09, 0.11)  # of fingers, index to little, and thumb, in palm lengths
KNUCKLES = np.array([[-30, -10, 11, 30, -40], [-96, -100, -95, -84, -34]]).T / 100  # x, y from the wrist
BONES = np.array([[46, 52, 48, 37, 36], [28, 32, 30, 22, 34], [22, 23, 23, 20, 24]]).T / 100
DIRECTIONS = (-0.14, -0.03, 0.08, 0.20, -0.65)  # radians from upwards
Thing = namedtuple("Thing", "points depth rgb warmth salient")  # outline, two ends of a mark; depth 1: near
Pairs = namedtuple("Pairs", "A B points salient")  # landmarks (N, P, 4); which are on the plant, or None
POT = np.array([[-30, 0, 30, 24, 18, -18, -24, 15, -9], [0, 0, 0, 24, 48, 48, 24, 0, 24]]).T / 200
STONE = np.array([[cos(a), sin(a)] for a in np.arange(12) * pi / 6] + [[0.5, 0], [-0.5, 0]])

class InputError(Exception):
    """What a user can mend; the message names the file or value, and the remedy."""

def to_tensor(picture):  # a Pillow picture as uint8 (C, H, W)
    return torch.tensor(np.atleast_3d(picture)).permute(2, 0, 1)

def to_uint8(images):  # images in [0, 1], clamped and rounded to their 256 levels
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)

def to_float(images):  # of uint8, as floats in [0, 1]; channels_last: the layout that convolutions like best
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)

def clouds(size, cells, grey, spread, rng):  # a smooth background: cells x cells colours around a grey
    pixels = grey + rng.uniform(-spread, spread, (cells, cells, 1)) + rng.uniform(-30, 30, (cells, cells, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize(size, Image.BICUBIC)

def photograph(picture, rng):  # at half its size and with the noise of a sensor: uint8 (C, H, W)
    I = np.asarray(picture.reduce(2))
    return to_tensor((I + 5 * rng.standard_normal(I.shape, np.float32)).clip(0, 255).astype(np.uint8))

def make_digits(n, size, seed):  # slanted, stretched, bent: (n, 1, size, size) in [0, 1]; labels (n,)
    rng = np.random.default_rng(seed)
    font, centre = ImageFont.load_default(size=3.4 * size), (2 * size, 2 * size)
    labels, digits = rng.integers(10, size=n), []
    for label in labels:
        canvas = Image.new("L", (4 * size, 4 * size))
        bold = round(rng.uniform(0, 0.2) * size)
        ImageDraw.Draw(canvas).text(centre, str(label), 255, font, anchor="mm", stroke_width=bold)
        A = np.diag(rng.uniform(0.9, 1.4, 2)) + rng.uniform(-0.35, 0.35, (2, 2))
        b = centre - A @ centre + rng.uniform(-0.3, 0.3, 2) * size  # Pillow maps new places to old
        canvas = canvas.transform(canvas.size, Image.AFFINE, np.c_[A, b].ravel(), Image.BILINEAR)
        digits.append(to_tensor(canvas.reduce(4)) / 255)
    field = warp.random_field(n, (size, size), 0.04, 0.0, torch.Generator().manual_seed(seed))
    return warp.resample(torch.stack(digits), field), torch.from_numpy(labels)

def apply_look(look, x, seed):  # digits x (B, 1, S, S) in [0, 1] as a domain shows them: uint8 (B, 3, S, S)
    if look == "source":
        return to_uint8(x).expand(-1, 3, -1, -1)
    gen = torch.Generator().manual_seed(seed)
    scene = 0.3 + 0.8 * (torch.rand(len(x), 3, 1, 1, generator=gen) - 0.5)
    for octave in range(1, 5):  # the finer, the weaker
        noise = torch.rand(len(x), 3, 2 ** octave, 2 ** octave, generator=gen) - 0.5
        scene = scene + 0.6 ** octave * nnf.interpolate(noise, x.shape[2:], mode="bicubic")
    scene = torch.lerp(scene.mean(1, keepdim=True), scene, 0.5).clamp(0, 1)  # half grey
    if look == "difference":  # the recipe of MNIST-M
        x = (scene - x).abs()
    elif look == "paint":  # a bright colour on a calm, darker ground
        ink, ground = torch.rand(2, len(x), 3, 1, 1, generator=gen)
        x = torch.lerp(0.3 * scene + 0.4 * ground, 0.6 + 0.4 * ink, x)
    else:  # chalk: gaps, smears and grain
        grain, gaps = torch.rand(2, *x.shape, generator=gen)
        x = nnf.avg_pool2d(x * (gaps > 0.4) + 0.5 * scene, 3, stride=1, padding=1) + 0.2 * grain - 0.1
    return to_uint8(x)

def pose_hand(rng):  # left, (5 fingers, 5, 3): wrist, knuckle, two joints, tip; x, y, and z to the camera
    joints = np.zeros((5, 5, 3))
    joints[:, :2, :2] = KNUCKLES[:, None] * [[0.45, 0], [1, 1]]
    spread = rng.uniform(0.3, 1.7)
    fist = rng.uniform(0.2, 1.4) * rng.integers(2)  # half of the hands are open
    for joint, bones, direction in zip(joints, BONES, DIRECTIONS):
        angle = spread * direction + rng.uniform(-0.1, 0.1)
        along = np.array([sin(angle), -cos(angle), 0])
        curl = fist * rng.integers(2) + rng.uniform(0, 0.3)
        for k, bend in enumerate(np.cumsum([0.6 * curl, curl, curl])):
            joint[k + 2] = joint[k + 1] + bones[k] * (cos(bend) * along + [0, 0, sin(bend)])
    turn = rng.uniform(-0.7, 0.7)
    joints[..., :2] @= [[cos(turn), sin(turn)], [-sin(turn), cos(turn)]]
    joints[..., 2] += joints[..., :2] @ rng.uniform(-0.4, 0.4, 2)  # tilted to the camera or away from it
    return joints

def stroke(picture, start, end, radius, colour):  # a thick line with round ends; z does not count
    pen, colour = ImageDraw.Draw(picture), tuple(map(int, colour))
    pen.line([*start[:2], *end[:2]], colour, round(2 * radius))
    for point in (start, end):
        pen.circle(point[:2], radius, colour)

def draw_hand(side, rng):  # RGB, depth and X-ray at half that side, and 17 landmarks (34,) in shares of it
    joints = pose_hand(rng)
    low = joints[:, 1:, :2].min((0, 1))
    extent = np.ptp(joints[:, 1:, :2], (0, 1))
    palm = rng.uniform(0.5, 0.8) * side / max(*extent, 1.4)  # its length in pixels: all fingers fit
    joints *= palm
    joints[..., :2] += rng.uniform(0.03, 0.97, 2) * (side - palm * extent) - palm * low
    bones = [(joint[k], joint[k + 1], (radius if k > 0 else 0.13) * palm)
             for joint, radius in zip(joints, RADII) for k in range(4)]
    bones += [(wrist, wrist + [0, 1.7 * palm, 0], 0.14 * palm) for wrist in joints[[0, 3], 0]]  # the arm
    rgb = clouds((side, side), 5, rng.uniform(60, 180), 60, rng)  # mostly grey, as rooms are
    depth = Image.new("L", (side, side), int(rng.integers(10, 60)))
    flesh, skeleton = (Image.new("L", (side, side)) for _ in range(2))
    skin = rng.uniform(120, 250) * np.array([0.95, 0.72, 0.60])
    for start, end, radius in sorted(bones, key=lambda bone: bone[0][2] + bone[1][2]):  # far ones first
        for k in range(3):  # narrower and brighter strokes on one another look round; what is near, bright
            stroke(rgb, start, end, radius * (1 - 0.3 * k), skin * (0.7 + 0.15 * k))
            stroke(depth, start, end, radius * (1 - 0.3 * k), [130 + 35 * (start[2] + end[2]) / palm + 8 * k])
        stroke(flesh, start, end, radius, [90])
        gap = 0.1 * (end - start)  # at the joints
        stroke(skeleton, start + gap, end - gap, 0.35 * radius, [110])
    film = 20.0 + np.asarray(flesh.filter(ImageFilter.GaussianBlur(side / 48))) + np.asarray(skeleton)
    xray = Image.fromarray((film * np.linspace(*rng.uniform(0.6, 1, 2), side)).astype(np.uint8))  # uneven
    landmarks = np.concatenate([joints[:4, 1:].reshape(16, 3), joints[4:, 4]])  # fingers, the thumb's tip
    views = [photograph(picture, rng).expand(3, -1, -1) for picture in (rgb, depth, xray)]
    return *views, torch.tensor(landmarks[:, :2] / side).float().flatten()

def make_hands(n, size, seed):  # {"source": RGB, "depth", "xray": (n, 3, size, size)}; landmarks (n, 34)
    rng = np.random.default_rng(seed)
    *views, landmarks = map(torch.stack, zip(*(draw_hand(2 * size, rng) for _ in range(n))))
    return dict(zip(("source", "depth", "xray"), views)), landmarks

def plant_scene(rng):  # random things; each has a bright mark, whose two ends are landmarks
    for _ in range(5):
        stone = rng.uniform([0, 0.7], [1, 1]) + rng.uniform(0.05, 0.08) * STONE
        yield Thing(stone, rng.uniform(0, 0.5), (0.8, 0.75, 0.65), 0.75, False)
        label = rng.uniform([0, 0.05], [1, 0.6]) + rng.uniform(0.06, 0.09) * STONE[[0, 3, 6, 9, 12, 13]]
        yield Thing(label, rng.uniform(0, 0.5), (0.15, 0.1, 0.2), 0.1, False)
    root = rng.uniform([0.38, 0.66], [0.62, 0.78])
    yield Thing(root + POT, 0.5, (0.7, 0.35, 0.2), 0.8, False)
    for _ in range(8):
        angle, length, width = rng.uniform([-3.0, 0.28, 0.06], [-0.14, 0.48, 0.09])
        along = np.array([cos(angle), sin(angle)])
        t = np.linspace(0, 1, 9)[:, None]
        midrib = root + length * (t * along + rng.uniform(0, 0.6) * t ** 2 * [0, 1])  # it droops
        half = width * np.sin(np.pi * t) * along[::-1] * [-1, 1]
        leaf = np.concatenate([midrib + half, (midrib - half)[::-1], midrib[[3, 6]]])
        yield Thing(leaf, rng.uniform(0.4, 1), (0.25, 0.6, 0.2), 0.2, True)

def draw_scene(things, size, modality, rng):  # the picture; all ends of marks (P, 2) in pixels; visible? (P,)
    sides = np.array(size[::-1])
    picture = clouds(2 * sides, 6, rng.uniform(80, 130), 25, rng).convert("RGB" if modality == "rgb" else "L")
    owner = Image.new("L", size[::-1])  # the number of the thing that a pixel shows
    pen = ImageDraw.Draw(picture)
    for number, (points, depth, rgb, warmth, _) in enumerate(things, 1):
        colour = 255 * np.array({"rgb": rgb, "ir": [warmth], "depth": [0.2 + 0.7 * depth]}[modality])
        colour *= 1 if modality == "depth" else rng.uniform(0.75, 1.25, len(colour))
        *outline, start, end = sides * points
        pen.polygon((2 * np.ravel(outline)).tolist(), tuple(map(int, colour)))
        ImageDraw.Draw(owner).polygon(np.ravel(outline).tolist(), number)
        if modality != "depth":  # a painted mark has no relief
            pen.line([*2 * start, *2 * end], tuple(map(int, colour + 90)), sides[0] // 20)
    ends = sides * np.concatenate([thing.points[-2:] for thing in things])
    column, row = ends.astype(int).clip(0, sides - 1).T
    shown = np.asarray(owner)[row, column] == np.repeat(np.arange(len(things)) + 1, 2)
    return photograph(picture, rng), ends - 0.5, shown & ((ends > 0) & (ends < sides)).all(1)

def misaligned(thing, knots, shift):  # moved by a field quadratic in x and in y, through 3x3 knots
    p = thing.points - 0.5
    x, y = np.stack([p * (2 * p - 1), 1 - 4 * p * p, p * (2 * p + 1)]).T  # Lagrange's polynomials
    return thing._replace(points=thing.points + np.einsum("pi,pj,ijk->pk", y, x, knots) + shift)

def make_plants(n, size, seed, modality="ir", rig=False):
    """n misaligned pairs; points (n, P, 4): xa, ya, xb, yb in px, NaN if hidden; salient: on the plant."""
    rng, pairs = np.random.default_rng(seed), []
    share, fixed, baseline = (0.35, [0.07, 0.04], [0.10, 0]) if rig else (1, 0, 0)  # share: of what is random
    for _ in range(n):
        knots = share * rng.normal(0, BEND, (3, 3, 2))
        offset = share * rng.normal(0, SHIFT, 2) + fixed
        parallax = (not rig) * rng.normal(0, 0.03, 2) + baseline  # of depth 1 against depth 0
        things = sorted(plant_scene(rng), key=lambda thing: thing.depth)  # far ones first
        moved = [misaligned(thing, knots, offset + parallax * (thing.depth - 0.5)) for thing in things]
        A, p_a, in_a = draw_scene(things, size, "rgb", rng)
        B, p_b, in_b = draw_scene(moved, size, modality, rng)
        points = np.where((in_a & in_b)[:, None], np.hstack([p_a, p_b]), np.nan)
        salient = torch.tensor([thing.salient for thing in things]).repeat_interleave(2)
        pairs.append((A, B, torch.tensor(points).float(), salient))
    return Pairs(*map(torch.stack, zip(*pairs)))

@contextmanager
def blaming(what, remedy="correct it"):  # what fails inside becomes an InputError: what, reason, remedy
    try:
        yield
    except Exception as error:  # which one depends on the bytes of the file
        reason = str(error).partition("\n")[0]
        raise InputError(f"{what} ({reason}); {remedy}") from None

def stretch(pixels):  # deep ones as 8 bits, from the .5 to the 99.5 percentile of those that count
    inside = np.isfinite(pixels)
    inside &= pixels > pixels[inside].min(initial=np.inf)  # often padding or "no data": black, as NaN is
    low, high = np.percentile(pixels[inside], (0.5, 99.5)) if inside.any() else (0, 1)
    if low == high:  # a few bright spots
        low, high = pixels[inside].min(), pixels[inside].max()
    levels = np.interp(pixels, (low, high), (1, 255))  # if all that counts is of one value, 255
    return Image.fromarray(np.where(inside, levels.round(), 0).astype(np.uint8))

def open_image(path, mode="RGB"):
    """The file, upright, on black, 8 bits deep: "RGB", "L" (grey) or, with mode None, whichever it is."""
    with blaming(f"{path}: not a readable image", "give an 8-bit RGB or grey one"), open(path, "rb") as file:
        image = Image.open(file, formats=("PNG", "JPEG", "BMP", "TIFF", "WEBP"))
        stored = str(image.tile)
        tags = getattr(image, "tag_v2", {})  # of a TIFF; 258: bits; 262: 0 if white is 0; 339: 2 if signed
        deep = image.mode[0] in "IF"  # one channel of 16 bits or more; of more channels, Pillow drops bits
        wrong = {"several pages": image.format != "MPO" and getattr(image, "n_frames", 1) > 1,  # MPO: photo
                 "16 bits per channel": not deep and (";16" in stored or max(tags.get(258, [8])) > 8),
                 f"mode {image.mode}": image.mode in ("CMYK", "YCbCr", "LAB", "HSV"),
                 "white stored as 0": deep and tags.get(262) == 0,
                 "signed bytes": tags.get(258) == (8,) and tags.get(339) == (2,),
                 "over 178 megapixels: make it smaller": image.width * image.height > 178e6}
        if any(wrong.values()):
            raise ValueError(", ".join(reason for reason in wrong if wrong[reason]))
        picture = ImageOps.exif_transpose(image)
        if deep:
            pixels = np.asarray(picture)
            pixels = pixels.view(np.uint32) if "I;32N" in stored else pixels  # Pillow takes them for signed
            picture = stretch(pixels.astype(np.float32))
        if picture.has_transparency_data:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture.convert("RGBA"))
        return picture.convert("RGB").convert(mode or ("L" if image.mode[0] in "1LIF" else "RGB"))

def read_images(files, size, mode="RGB"):  # uint8 (N, C, H, W) of size (H, W); the files' own (width, height)
    def read(path):
        picture = open_image(path, mode)
        return to_tensor(picture.resize(size[::-1], Image.BILINEAR)), picture.size
    images, sides = zip(*ThreadPoolExecutor().map(read, files))
    return torch.stack(torch.broadcast_tensors(*images)), sides  # one coloured image makes all coloured

def say(folder, found, used):  # what was found in a folder, and what else lies there
    others = [path.name for path in sorted(folder.glob("[!.]*")) if path.name not in (*used, "Thumbs.db")]
    print(f"{folder}: {found}; passed over: {', '.join(others[:9]) or 'nothing'}")

def list_images(folder):  # {stem: path}, sorted; names that begin with a dot are some system's own
    files = [path for path in sorted(folder.glob("[!.]*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    found = {normalize("NFC", path.stem): path for path in files}
    if not files:
        raise InputError(f"{folder}: no such folder, or no image in it; correct it, --data or --unseen")
    if len(found) < len(files):
        raise InputError(f"{folder}: two images of one name but for the suffix; rename one")
    say(folder, f"{len(files)} images", [path.name for path in files])
    return found

def read_landmarks(table, columns, sides):
    """For each image (n, K): its n lines of the csv, of K coordinates, in shares of sides[stem] (K,)."""
    rows = {stem: [] for stem in sides}
    with blaming(f"{table}: not a readable table", "correct it as README.md says"):
        lines = list(csv.reader(table.read_text("utf-8-sig", "replace").splitlines(), skipinitialspace=True))
        if lines[:1] != [["name", *columns]]:
            raise ValueError(f"its first line must be name,{','.join(columns)}")
    for number, (name, *words) in filter(all, enumerate(lines[1:], 2)):  # no empty line: (2, []) is not all
        name = normalize("NFC", name)
        stem = name if name in sides else Path(name).stem
        line = f"{table}, line {number}: {','.join([name, *words])[:60]!r}"
        with blaming(f"{line} is not an image here and {len(columns)} pixels inside it"):
            row = np.array(words, float).reshape(len(columns))
            if not ((row >= -1) & (row <= sides[stem])).all():
                raise ValueError("a point is outside")
            rows[stem].append(row)
    pixels = [np.reshape(row, (-1, len(columns))) for row in rows.values()]
    if 0 < np.concatenate(pixels).max(initial=0) <= 1:
        raise InputError(f"{table}: no coordinate is above 1; give pixels, not shares, or remove it")
    return [torch.tensor((row + 0.5) / side) for row, side in zip(pixels, sides.values())]

def load_mnist(folder, split, size):  # images (N, 1, size, size) in [0, 1], labels (N,); plain or .gz
    arrays = []
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        plain = Path(folder, f"{split}-{kind}-ubyte")
        path = plain if plain.exists() else Path(f"{plain}.gz")
        with blaming(f"{path}: damaged or missing", "correct --data, fetch it again, or add --task hands"):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            magic, *shape = np.frombuffer(content, ">i4", 1 + dimensions)
            if magic != 0x800 + dimensions:
                raise ValueError("not an IDX file of bytes")
            arrays.append(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape))
    x, y = map(torch.tensor, arrays)
    if len(x) != len(y) or max(y.tolist(), default=10) > 9:
        raise InputError(f"{folder}: {len(x)} images, {len(y)} labels, or some are no digits; fetch it again")
    return nnf.interpolate(x[:, None] / 255, (size, size), mode="bilinear", antialias=True), y.long()

def load_mnist_m(folder, size):  # images (N, 3, size, size), labels of a split: NAME/ and NAME_labels.txt
    with blaming(f"{folder}: no such folder, or no mnist_m_*_labels.txt in it"):
        table = min(folder.glob("mnist_m_*_labels.txt"))  # test before train
        lines = table.read_text("utf-8", "replace").splitlines() or [""]
    files, labels = [], []
    for number, line in enumerate(lines, 1):
        with blaming(f"{table}, line {number}: {line[:60]!r} is not `image digit`"):
            name, label = line.strip().rsplit(" ", 1)
            labels.append(list("0123456789").index(label))
            files.append(folder / table.name.removesuffix("_labels.txt") / name)
    return read_images(files, (size, size))[0], torch.tensor(labels)

def load_landmarks(folder, size):  # images (N, 3, size, size), landmarks (N, 34): images/, landmarks.csv
    files = list_images(Path(folder, "images"))
    x, sides = read_images(files.values(), (size, size))
    rows = read_landmarks(Path(folder, "landmarks.csv"), HAND_COLUMNS, dict(zip(files, np.tile(sides, 17))))
    for path, found in zip(files.values(), rows):
        if len(found) != 1:
            raise InputError(f"{path}: has {len(found)} lines in landmarks.csv, needs one; correct it")
    return x, torch.cat(rows).float()

def finish(o, x, y, domains, read):  # as many as --train asks for; the user's folders among the domains
    if len(x) < (o.train or 1):
        raise InputError(f"--train {o.train or 1}: there are only {len(x)} training images; ask for fewer")
    for folder in (Path(name).resolve() for name in o.unseen):
        if folder.name in domains:
            raise InputError(f"{folder}: a second domain of that name; rename the folder")
        domains[folder.name] = read(folder, o.size)
    return x[:o.train], y[:o.train], domains

def load_digits(o):
    """Training images (N, 3, S, S), labels (N,), and the domains to measure: {name: (images, labels)}."""
    n = o.train or 10_000
    embedded = o.data == "embedded"
    x, y = make_digits(n, o.size, 2 * o.seed) if embedded else load_mnist(o.data, "train", o.size)
    x_test, y_test = make_digits(2000, o.size, TEST_SEED) if embedded else load_mnist(o.data, "t10k", o.size)
    looks = ("source", "difference", "paint", "chalk") if embedded and not o.unseen else ("source",)
    domains = {look: (apply_look(look, x_test, 7), y_test) for look in looks}
    return finish(o, apply_look("source", x[:n], 0), y[:n], domains, load_mnist_m)

def load_hands(o):  # as load_digits: RGB hands (N, 3, S, S), landmarks (N, 34) in shares of the side
    if o.data == "embedded":
        views, y = make_hands(o.train or 3000, o.size, 2 * o.seed)
        tests, y_test = make_hands(500, o.size, TEST_SEED)
        return finish(o, views["source"], y, {name: (I, y_test) for name, I in tests.items()}, load_landmarks)
    x, y = load_landmarks(o.data, o.size)
    held_out = torch.arange(len(x)) % 10 == 0  # every tenth image of a folder is the source to measure
    return finish(o, x[~held_out], y[~held_out], {"source": (x[held_out], y[held_out])}, load_landmarks)

LOADERS = {"digits": load_digits, "hands": load_hands}  # by --task

def read_pairs(folder, size, modes):  # a split: A and B of one name, with their landmarks in pixels at `size`
    a, b = (list_images(folder / side) for side in "AB")
    if alone := a.keys() ^ b.keys():
        raise InputError(f"{(a | b)[min(alone)]}: no partner of that name; add one or remove it")
    A, sides_a = read_images(a.values(), size, modes["A"])
    B, sides_b = read_images([b[stem] for stem in a], size, modes["B"])
    table, rows = folder / "landmarks.csv", len(A) * [torch.zeros(0, 4)]
    if table.exists():
        rows = read_landmarks(table, ["xa", "ya", "xb", "yb"], dict(zip(a, np.hstack([sides_a, sides_b]))))
    say(folder, f"{len(A)} pairs, {sum(map(len, rows))} pairs of points", ("A", "B", "landmarks.csv"))
    points = torch.nn.utils.rnn.pad_sequence(rows, True, np.nan) * torch.tensor(2 * size[::-1]) - 0.5
    return Pairs(A, B, points.float(), None)  # above, 2 * size[::-1] is the tuple (W, H, W, H)

def load_pairs(o, modes=None):
    """{"train": Pairs, "test": Pairs} and the modes {"A": "RGB" or "L", "B"}: found, or those of a run."""
    size = (o.height, o.width)
    if o.data == "embedded":
        train = make_plants(o.train, size, 2 * o.seed, o.modality, o.rig)
        test = make_plants(100, size, TEST_SEED, o.modality, o.rig)
        return {"train": train, "test": test}, {"A": "RGB", "B": "L"}
    train = read_pairs(Path(o.data, "train"), size, modes or {"A": None, "B": None})
    modes = {side: "RGB" if images.shape[1] == 3 else "L" for side, images in zip("AB", train)}
    test = read_pairs(Path(o.data, "test"), size, modes) if Path(o.data, "test").is_dir() else train
    return {"train": train, "test": test}, modes
