"""Data: digits, hands and plants drawn with Pillow, and readers of a user's own files.

Images are uint8 (N, C, H, W). Points are (x, y), x right and y down: in pixels, where the centre of the
top-left pixel is (0, 0), or in shares of the sides, (pixel + 0.5) / side.

What is drawn depends on a seed alone: far things first, at twice the size or more, and then reduced, which
smooths edges. A *look* turns grey digits into the colours and textures of a domain.
"""
import csv
import gzip
import math
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch.nn.utils.rnn import pad_sequence

import warp

UNSEEN_LOOKS = ("difference", "paint", "chalk")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
TEST_SEED = 999_003  # the digits, hands and scenes that are measured are the same for every --seed
BEND, SHIFT = 0.088, 0.02  # how plants are misaligned: at 3x3 knots, and as a whole; in shares of the sides

class InputError(Exception):
    """What a user can mend; the message names the file or value, and the remedy."""

def to_tensor(picture):
    """A Pillow picture as uint8 (C, H, W)."""
    return torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1)

def to_uint8(images):
    """Images in [0, 1], clamped and rounded to their 256 levels."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)

def to_float(images):
    """uint8 images in [0, 1]; channels_last is the layout that convolutions like best."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)

def clouds(size, cells, grey, contrast, rng):
    """A smooth RGB background: cells x cells colours around a level of grey, enlarged."""
    light = rng.uniform(-contrast, contrast, (cells, cells, 1))
    colour = rng.uniform(-30, 30, (cells, cells, 3))
    pixels = (grey + light + colour).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC)

def photograph(picture, rng):
    """A picture at half its size and with the noise of a sensor: uint8 (C, H, W)."""
    pixels = np.asarray(picture.reduce(2))
    noise = 5 * rng.standard_normal(pixels.shape, np.float32)
    return to_tensor((pixels + noise).clip(0, 255).astype(np.uint8))

# ---------------------------------------------------------------- digits
def make_digits(n, size, seed):
    """n digits, white on black, slanted, stretched and bent: (n, 1, size, size) in [0, 1]; labels (n,)."""
    rng = np.random.default_rng(seed)
    font = ImageFont.load_default(size=3.4 * size)
    centre = (2 * size, 2 * size)
    labels = rng.integers(10, size=n)
    digits = []
    for label in labels:
        canvas = Image.new("L", (4 * size, 4 * size))
        thickness = round(rng.uniform(0, 0.2) * size)
        ImageDraw.Draw(canvas).text(centre, str(label), 255, font, anchor="mm", stroke_width=thickness)
        # Pillow asks for the map from new places to old ones: old = A (new - centre) + centre + shift
        A = np.diag(rng.uniform(0.9, 1.4, 2)) + rng.uniform(-0.35, 0.35, (2, 2))
        b = centre - A @ centre + rng.uniform(-0.3, 0.3, 2) * size
        matrix = (*A[0], b[0], *A[1], b[1])
        canvas = canvas.transform(canvas.size, Image.AFFINE, matrix, Image.BILINEAR)
        digits.append(to_tensor(canvas.reduce(4)) / 255)

    field = warp.random_field(n, (size, size), 0.04, 0.0, torch.Generator().manual_seed(seed))
    return warp.resample(torch.stack(digits), field), torch.from_numpy(labels)

def apply_look(look, x, seed):
    """Grey digits x (B, 1, S, S) in [0, 1] in the look of a domain: uint8 (B, 3, S, S)."""
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
    elif look == "chalk":  # gaps, smears and grain
        grain, gaps = torch.rand(2, *x.shape, generator=gen)
        x = nnf.avg_pool2d(x * (gaps > 0.4) + 0.5 * scene, 3, stride=1, padding=1) + 0.2 * grain - 0.1
    return to_uint8(x)

# ---------------------------------------------------------------- hands
Finger = namedtuple("Finger", "x y bones radius direction")  # knuckle, lengths in palm lengths; radians
FINGERS = (  # index, middle, ring and little finger, thumb, as seen from the wrist; up is negative
    Finger(-0.30, -0.96, (0.46, 0.28, 0.22), 0.10, -0.14),
    Finger(-0.10, -1.00, (0.52, 0.32, 0.23), 0.10, -0.03),
    Finger(0.11, -0.95, (0.48, 0.30, 0.23), 0.10, 0.08),
    Finger(0.30, -0.84, (0.37, 0.22, 0.20), 0.09, 0.20),
    Finger(-0.40, -0.34, (0.36, 0.34, 0.24), 0.11, -0.65))

def pose_hand(rng):
    """A random left hand (5 fingers, 5, 3): wrist, knuckle, two joints, tip; x, y, and z to the camera."""
    joints = np.zeros((5, 5, 3))
    spread = rng.uniform(0.3, 1.7)
    fist = rng.uniform(0.2, 1.4) * rng.integers(2)  # half of the hands are open
    for joint, finger in zip(joints, FINGERS):
        joint[0, 0] = 0.45 * finger.x
        joint[1, :2] = finger.x, finger.y
        angle = spread * finger.direction + rng.uniform(-0.1, 0.1)
        along = np.array([math.sin(angle), -math.cos(angle), 0])
        curl = fist * rng.integers(2) + rng.uniform(0, 0.3)
        bend = 0.6 * curl
        for k, length in enumerate(finger.bones, 2):
            joint[k] = joint[k - 1] + length * (math.cos(bend) * along + [0, 0, math.sin(bend)])
            bend += curl

    turn = rng.uniform(-0.7, 0.7)
    along = np.array([math.cos(turn), math.sin(turn)])
    joints[..., :2] @= np.array([along, along[::-1] * [-1, 1]])
    joints[..., 2] += joints[..., :2] @ rng.uniform(-0.4, 0.4, 2)  # tilted to the camera or away from it
    return joints

def stroke(picture, start, end, radius, colour):
    """Draw a thick line with round ends; of the points only x and y count."""
    pen = ImageDraw.Draw(picture)
    colour = tuple(map(int, colour))
    pen.line([*start[:2], *end[:2]], colour, round(2 * radius))
    for point in (start, end):
        pen.circle(tuple(point[:2]), radius, colour)

def draw_hand(size, rng):
    """One hand as RGB, depth and X-ray (3, size, size), and its 17 landmarks (34,) in shares of the side."""
    side = 2 * size
    joints = pose_hand(rng)
    low = joints[:, 1:, :2].min((0, 1))
    extent = joints[:, 1:, :2].max((0, 1)) - low
    palm = rng.uniform(0.5, 0.8) * side / max(*extent, 1.4)  # its length in pixels: all fingers fit
    joints *= palm
    joints[..., :2] += rng.uniform(0.03, 0.97, 2) * (side - palm * extent) - palm * low

    bones = [(joint[k], joint[k + 1], (finger.radius if k > 0 else 0.13) * palm)
             for joint, finger in zip(joints, FINGERS) for k in range(4)]
    bones += [(wrist, wrist + [0, 1.7 * palm, 0], 0.14 * palm) for wrist in joints[[0, 3], 0]]  # the arm
    bones.sort(key=lambda bone: bone[0][2] + bone[1][2])  # far ones first

    rgb = clouds((side, side), 5, rng.uniform(60, 180), 60, rng)  # mostly grey, as rooms are
    depth = Image.new("L", (side, side), int(rng.integers(10, 60)))
    flesh = Image.new("L", (side, side))
    skeleton = Image.new("L", (side, side))
    skin = rng.uniform(120, 250) * np.array([0.95, 0.72, 0.60])
    for start, end, radius in bones:
        near = 130 + 35 * (start[2] + end[2]) / palm
        for k in range(3):  # narrower and brighter strokes on one another look round
            stroke(rgb, start, end, radius * (1 - 0.3 * k), skin * (0.7 + 0.15 * k))
            stroke(depth, start, end, radius * (1 - 0.3 * k), [near + 8 * k])
        stroke(flesh, start, end, radius, [90])
        gap = 0.1 * (end - start)  # at the joints
        stroke(skeleton, start + gap, end - gap, 0.35 * radius, [110])

    film = 20.0 + np.asarray(flesh.filter(ImageFilter.GaussianBlur(size / 24))) + np.asarray(skeleton)
    film *= np.linspace(*rng.uniform(0.6, 1, 2), side)  # it is not evenly lit
    xray = Image.fromarray(film.astype(np.uint8))
    views = [photograph(picture, rng).expand(3, -1, -1) for picture in (rgb, depth, xray)]
    landmarks = np.concatenate([joints[:4, 1:].reshape(16, 3), joints[4:, 4]])  # fingers, the thumb's tip
    return *views, torch.tensor(landmarks[:, :2] / side).float().flatten()

def make_hands(n, size, seed):
    """{"source": RGB, "depth", "xray": (n, 3, size, size)} and landmarks (n, 34), shares of the side."""
    rng = np.random.default_rng(seed)
    hands = [draw_hand(size, rng) for _ in range(n)]
    *views, landmarks = map(torch.stack, zip(*hands))
    return dict(zip(("source", "depth", "xray"), views)), landmarks

# ---------------------------------------------------------------- plants
Thing = namedtuple("Thing", "outline mark depth rgb warmth salient")  # in shares of the sides; depth 1: near
Pairs = namedtuple("Pairs", "A B points salient")  # the last two are None where there are no landmarks
CIRCLE = np.array([[math.cos(a), math.sin(a)] for a in np.linspace(0, math.tau, 12, endpoint=False)])
POT = np.array([[-15, 0], [0, 0], [15, 0], [12, 12], [9, 24], [-9, 24], [-12, 12]]) / 100

def plant_scene(rng):
    """The things of a random scene, far ones first. Each has a bright mark, whose two ends are landmarks."""
    things = []
    for _ in range(5):
        for shape, radii, top, bottom, rgb, warmth in (  # a stone on the ground, a label above it
                (CIRCLE, (0.05, 0.08), 0.7, 1.0, (0.8, 0.75, 0.65), 0.75),
                (CIRCLE[::3], (0.06, 0.09), 0.05, 0.6, (0.15, 0.1, 0.2), 0.1)):
            place = rng.uniform([0.0, top], [1.0, bottom])
            outline = rng.uniform(*radii) * shape
            mark = place + 0.5 * outline[[0, len(shape) // 2]]
            things.append(Thing(place + outline, mark, rng.uniform(0, 0.5), rgb, warmth, False))

    root = rng.uniform([0.38, 0.66], [0.62, 0.78])
    things.append(Thing(root + POT, root + 0.5 * POT[[2, 5]], 0.5, (0.7, 0.35, 0.2), 0.8, False))

    for _ in range(8):
        angle, length, width = rng.uniform([-3.0, 0.28, 0.06], [-0.14, 0.48, 0.09])
        along = np.array([math.cos(angle), math.sin(angle)])
        t = np.linspace(0, 1, 9)[:, None]
        midrib = root + length * (t * along + rng.uniform(0, 0.6) * t ** 2 * [0, 1])  # it droops
        half = width * np.sin(np.pi * t) * along[::-1] * [-1, 1]
        leaf = np.concatenate([midrib + half, (midrib - half)[::-1]])
        things.append(Thing(leaf, midrib[[3, 6]], rng.uniform(0.4, 1), (0.25, 0.6, 0.2), 0.2, True))
    return sorted(things, key=lambda thing: thing.depth)

def draw_scene(things, size, modality, rng):
    """A picture of the things; the ends of all marks (P, 2) in pixels; which of them are visible (P,)."""
    sides = np.array(size[::-1])
    picture = clouds(tuple(2 * sides), 6, rng.uniform(80, 130), 25, rng)
    picture = picture.convert("RGB" if modality == "rgb" else "L")
    owner = Image.new("L", size[::-1])  # the number of the thing that a pixel shows
    pen = ImageDraw.Draw(picture)
    for number, thing in enumerate(things, 1):
        levels = {"rgb": thing.rgb, "ir": [thing.warmth], "depth": [0.2 + 0.7 * thing.depth]}[modality]
        colour = 255 * np.array(levels)
        if modality != "depth":
            colour *= rng.uniform(0.75, 1.25, len(colour))
        outline = sides * thing.outline
        pen.polygon((2 * outline).ravel().tolist(), tuple(map(int, colour)))
        ImageDraw.Draw(owner).polygon(outline.ravel().tolist(), number)
        if modality != "depth":  # a painted mark has no relief
            mark = (2 * sides * thing.mark).ravel().tolist()
            pen.line(mark, tuple(map(int, colour + 90)), sides[0] // 20)

    ends = sides * np.concatenate([thing.mark for thing in things])
    inside = ((ends > 0) & (ends < sides)).all(1)
    column, row = ends.astype(int).clip(0, sides - 1).T
    numbers = np.repeat(np.arange(len(things)) + 1, 2)
    visible = inside & (np.asarray(owner)[row, column] == numbers)
    return photograph(picture, rng), ends - 0.5, visible

def misaligned(thing, knots, shift):
    """The thing, moved by a shift and by a field quadratic in x and in y, through 3x3 knots (3, 3, 2)."""
    def move(points):
        p = points - 0.5
        x, y = np.stack([p * (2 * p - 1), 1 - 4 * p * p, p * (2 * p + 1)]).T  # Lagrange's polynomials
        return points + np.einsum("pi,pj,ijk->pk", y, x, knots) + shift

    return thing._replace(outline=move(thing.outline), mark=move(thing.mark))

def make_plants(n, size, seed, modality="ir", rig=False):
    """n random pairs, misaligned by a smooth field and by parallax: A (n, 3, H, W), B (n, 1, H, W),
    landmarks (n, P, 4), pixels in A, then in B, NaN where either hides them; salient (n, P): on the plant.
    rig: two cameras on one rig, so that offset and parallax hardly change, and a smaller bend."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        knots = rng.normal(0, BEND, (3, 3, 2))
        offset = rng.normal(0, SHIFT, 2)
        parallax = rng.normal(0, 0.03, 2)
        if rig:
            knots = 0.35 * knots
            offset = 0.35 * offset + [0.07, 0.04]
            parallax = np.array([0.10, 0.0])
        things = plant_scene(rng)
        moved = [misaligned(thing, knots, offset + parallax * (thing.depth - 0.5)) for thing in things]

        A, p_a, in_a = draw_scene(things, size, "rgb", rng)
        B, p_b, in_b = draw_scene(moved, size, modality, rng)
        points = torch.tensor(np.hstack([p_a, p_b])).float()
        points[~(in_a & in_b)] = torch.nan
        salient = torch.tensor([thing.salient for thing in things]).repeat_interleave(2)
        pairs.append((A, B, points, salient))
    return Pairs(*map(torch.stack, zip(*pairs)))

# ---------------------------------------------------------------- image files
@contextmanager
def blaming(what, remedy):
    """Whatever fails inside becomes an InputError: what is wrong, the reason, and the remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # which one depends on the bytes of the file
        raise InputError(f"{what} ({error}); {remedy}") from None

def stretch(pixels):
    """Deep pixels as 8 bits, from the .5 to the 99.5 percentile of the finite ones above the lowest value.
    That is padding, "no data" or an empty background wherever it is common: it alone becomes black."""
    inside = np.isfinite(pixels)
    inside &= pixels > pixels[inside].min(initial=np.inf)
    levels = np.zeros(pixels.shape, np.uint8)
    if inside.any():
        low, high = np.percentile(pixels[inside], (0.5, 99.5))
        if low == high:
            low, high = pixels[inside].min(), pixels[inside].max()
        share = (pixels[inside] - low) / max(high - low, 1e-6)
        levels[inside] = (1 + 254 * share.clip(0, 1)).round()
    return Image.fromarray(levels)

def open_image(path, mode="RGB"):
    """The file as an upright picture of 8 bits, "RGB", "L" (grey) or, with mode None, whichever it is."""
    remedy = "save it as one picture, RGB of 8 bits or grey of any depth"
    with blaming(f"{path}: not a readable image", remedy), Image.open(path) as image:
        pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo, its preview
        deep = ";16" in str(image.tile) and image.mode[0] not in "IF"  # Pillow would drop the low bytes
        if pages > 1 or deep or image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            raise ValueError(f"{pages} pages, {image.mode}{' of 16 bits' if deep else ''}")

        picture = ImageOps.exif_transpose(image)
        if picture.mode[0] in "IF":
            picture = stretch(np.asarray(picture, np.float32))
        if picture.has_transparency_data:  # what is transparent is laid on black
            black = Image.new("RGBA", picture.size, "black")
            picture = Image.alpha_composite(black, picture.convert("RGBA"))
        return picture.convert("RGB").convert(mode or ("L" if image.mode[0] in "1LIF" else "RGB"))

def read_sized(files, size, mode):
    """The files as uint8 (N, C, H, W) of size (H, W), and their own upright widths and heights (N, 2)."""
    def read(path):
        picture = open_image(path, mode)
        return to_tensor(picture.resize(size[::-1], Image.BILINEAR)), picture.size

    with ThreadPoolExecutor() as pool:
        images, sides = zip(*pool.map(read, files))
    channels = max(map(len, images))  # one coloured image makes all of them coloured
    return torch.stack([image.expand(channels, -1, -1) for image in images]), sides

def read_images(files, size, mode="RGB"):
    """The files as uint8 (N, C, H, W) of size (H, W)."""
    return read_sized(files, size, mode)[0]

def list_images(folder):
    """{stem: path} of the images of a folder, sorted; names that begin with a dot are some system's own."""
    files = [path for path in sorted(folder.glob("[!.]*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    found = {path.stem: path for path in files}
    if not files or len(found) < len(files):
        raise InputError(f"{folder}: no such folder, or no image in it, or two of one name; correct it")
    return found

def read_landmarks(table, columns, sides):
    """The lines (n, K) of each image in a csv `name,columns`, pixels as shares of its sides {stem: (K,)}."""
    rows = {stem: [] for stem in sides}
    with (blaming(f"{table}: not a readable table", "correct it as README.md says"),
          open(table, newline="", encoding="utf-8-sig", errors="replace") as file):
        lines = csv.reader(file, skipinitialspace=True)
        if next(lines, None) != ["name", *columns]:
            raise ValueError(f"its first line must be name,{','.join(columns)}")
        for name, *words in filter(None, lines):
            stem = name if name in sides else Path(name).stem
            line = f"{table}, line {lines.line_num}: {','.join([name, *words])[:60]!r}"
            with blaming(f"{line} is not an image here and {len(columns)} pixels inside it", "correct it"):
                row = np.array(words, float).reshape(len(columns))
                if not ((row >= -1) & (row <= sides[stem])).all():
                    raise ValueError("a point is outside")
                rows[stem].append((row + 0.5) / sides[stem])
    return [torch.tensor(np.reshape(row, (-1, len(columns)))) for row in rows.values()]

# ---------------------------------------------------------------- what train.py asks for
def load_mnist(folder, split, size):
    """Images (N, 1, size, size) in [0, 1] and labels (N,) of MNIST's "train" or "t10k", plain or .gz."""
    arrays = []
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        path = Path(folder) / f"{split}-{kind}-ubyte"
        path = path if path.exists() else path.with_name(f"{path.name}.gz")
        with blaming(f"{path}: damaged or missing", "correct --data, fetch it again, or add --task hands"):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            _, *shape = np.frombuffer(content, ">i4", 1 + dimensions).tolist()
            arrays.append(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape))

    images, labels = map(torch.tensor, arrays)
    if len(images) == 0 or len(images) != len(labels) or labels.max() > 9:
        raise InputError(f"{folder}: {split} has {len(images)} images, {len(labels)} labels up to "
                         f"{max(labels.tolist(), default=0)}, which must be 0-9; fetch the files again")
    images = nnf.interpolate(images[:, None] / 255, (size, size), mode="bilinear", antialias=True)
    return images.clamp(0, 1), labels.long()

def load_mnist_m(folder, size):
    """Images (N, 3, size, size) and labels of a split of MNIST-M in a folder: NAME/ and NAME_labels.txt."""
    tables = sorted(folder.glob("mnist_m_*_labels.txt"))  # test before train
    if not tables:
        raise InputError(f"{folder}: no such folder, or no mnist_m_test_labels.txt in it; correct it")
    split = folder / tables[0].name.removesuffix("_labels.txt")
    files, labels = [], []
    for number, line in enumerate(tables[0].read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        files.append(split / name)
        if label not in list("0123456789") or not files[-1].is_file():
            raise InputError(f"{tables[0]}, line {number}: {line[:60]!r} is not `image digit`; correct it")
        labels.append(int(label))
    return read_images(files, (size, size)), torch.tensor(labels)

def load_landmarks(folder, size):
    """Images (N, 3, size, size) and landmarks (N, 34) of a folder with images/ and landmarks.csv."""
    files = list_images(folder / "images")
    x, sides = read_sized(files.values(), (size, size), "RGB")
    columns = [f"{axis}{i}" for i in range(17) for axis in "xy"]
    rows = read_landmarks(folder / "landmarks.csv", columns, dict(zip(files, np.tile(sides, 17))))
    for path, found in zip(files.values(), rows):
        if len(found) != 1:
            raise InputError(f"{path}: has {len(found)} lines in landmarks.csv, needs one; correct it")
    return x, torch.cat(rows).float()

def finish(o, x, y, domains, read):
    """The training data that --train asks for; the domains, with the user's folders under their names."""
    if len(x) < (o.train or 1):
        raise InputError(f"--train {o.train or 1}: there are only {len(x)} training images; ask for fewer")
    for folder in map(Path, o.unseen):
        name = folder.resolve().name
        if name in domains:
            raise InputError(f"{folder}: a second domain of that name; rename the folder")
        domains[name] = read(folder, o.size)
    return x[:o.train], y[:o.train], domains

def load_digits(o):
    """Training images (N, 3, S, S), labels (N,), and the domains to measure: {name: (images, labels)}."""
    n = o.train or 10_000
    looks = ("source",)
    if o.data == "embedded":
        x, y = make_digits(n, o.size, seed=2 * o.seed)
        x_test, y_test = make_digits(2000, o.size, TEST_SEED)
        looks += () if o.unseen else UNSEEN_LOOKS
    else:
        x, y = load_mnist(o.data, "train", o.size)
        x_test, y_test = load_mnist(o.data, "t10k", o.size)
    domains = {look: (apply_look(look, x_test, seed=7), y_test) for look in looks}
    return finish(o, apply_look("source", x[:n], 0), y[:n], domains, load_mnist_m)

def load_hands(o):
    """As load_digits: RGB hands, their landmarks, the domains. Of a folder every tenth image is held out."""
    if o.data == "embedded":
        views, y = make_hands(o.train or 3000, o.size, seed=2 * o.seed)
        x = views["source"]
        test_views, y_test = make_hands(500, o.size, TEST_SEED)
        domains = {name: (view, y_test) for name, view in test_views.items()}
    else:
        x, y = load_landmarks(Path(o.data), o.size)
        held_out = torch.arange(len(x)) % 10 == 0
        domains = {"source": (x[held_out], y[held_out])}
        x, y = x[~held_out], y[~held_out]
    return finish(o, x, y, domains, load_landmarks)

def read_pairs(folder, size, modes):
    """The pairs of a split, A and B of one name, with their landmarks in pixels at `size`."""
    a = list_images(folder / "A")
    b = list_images(folder / "B")
    for stem in a.keys() ^ b.keys():
        raise InputError(f"{a.get(stem) or b[stem]}: no partner of that name; add one or remove it")
    A, sides_a = read_sized(a.values(), size, modes["A"])
    B, sides_b = read_sized([b[stem] for stem in a], size, modes["B"])

    table = folder / "landmarks.csv"
    if not table.exists():
        return Pairs(A, B, None, None)
    sides = dict(zip(a, np.hstack([sides_a, sides_b])))
    rows = read_landmarks(table, ["xa", "ya", "xb", "yb"], sides)
    points = pad_sequence(rows, batch_first=True, padding_value=torch.nan) * torch.tensor(2 * size[::-1])
    return Pairs(A, B, (points - 0.5).float(), None)

def load_pairs(o, modes=None):
    """{"train": Pairs, "test": Pairs} and the modes {"A": "RGB" or "L", "B"}: found, or those of a run."""
    size = (o.height, o.width)
    if o.data == "embedded":
        train = make_plants(o.train, size, 2 * o.seed, o.modality, o.rig)
        test = make_plants(100, size, TEST_SEED, o.modality, o.rig)
        return {"train": train, "test": test}, {"A": "RGB", "B": "L"}
    folder = Path(o.data)
    train = read_pairs(folder / "train", size, modes or {"A": None, "B": None})
    modes = {side: "RGB" if images.shape[1] == 3 else "L" for side, images in zip("AB", train)}
    test = read_pairs(folder / "test", size, modes) if (folder / "test").is_dir() else train
    return {"train": train, "test": test}, modes

def augment(I_a, I_b, crop, gen):
    """A batch of unaligned pairs seen otherwise: both flipped and cropped alike, A through one more field.
    crop: share of the sides that may be cut off; a fifth of it is the bend of the field."""
    n, _, height, width = I_a.shape
    random = {"generator": gen, "device": gen.device}
    flip = torch.rand(n, 1, 1, 1, **random) < 0.5
    I_a = torch.where(flip, I_a.flip(3), I_a)
    I_b = torch.where(flip, I_b.flip(3), I_b)
    if crop > 0:
        cut = crop * torch.rand(n, 1, 1, 1, **random)
        centre = torch.rand(n, 2, 1, 1, **random)
        v = warp.pixel_grid(height, width, like=I_a)
        zoom = cut * (centre * v[..., -1:, -1:] - v)
        bend = warp.random_field(n, (height, width), crop / 5, 0.0, gen)
        I_a = warp.resample(warp.resample(I_a, zoom, "border"), bend, "border")
        I_b = warp.resample(I_b, zoom, "border")
    return I_a, I_b
