"""Data: digits, hands and plants drawn with Pillow, and readers of a user's own files.

Images are uint8 (N, C, H, W). Points are (x, y), x right and y down: in pixels, where the centre of the
top-left pixel is (0, 0), or in shares of the sides, (pixel + 0.5) / side.

What is drawn depends on a seed alone: far things first, at twice the size or more, and then reduced, which
smooths edges. A *look* turns grey digits into the colours and textures of a domain.
"""
import csv
import gzip
import math
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

import warp

UNSEEN_LOOKS = ("difference", "paint", "chalk")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
TEST_SEED = 999_003  # the digits, hands and scenes that are measured are the same for every --seed
BEND, SHIFT = 0.088, 0.02  # how plants are misaligned: at 3x3 knots, and as a whole; in shares of the sides

class InputError(Exception):
    """What a user can mend; the message names the file or value, and the remedy."""

def to_tensor(picture):
    """A Pillow picture as uint8 (C, H, W)."""
    pixels = np.array(picture)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)

def to_uint8(images):
    """Images in [0, 1], clamped and rounded to their 256 levels."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)

def to_float(images):
    """uint8 images in [0, 1]; channels_last is the layout that convolutions like best."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)

def add_noise(picture, rng, deviation=5):
    """The picture with the noise of a sensor."""
    pixels = np.asarray(picture) + deviation * rng.standard_normal(np.shape(picture), np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

def clouds(size, cells, grey, contrast, rng):
    """A smooth RGB background: cells x cells colours around a level of grey, enlarged."""
    light = rng.uniform(-contrast, contrast, (cells, cells, 1))
    colour = rng.uniform(-30, 30, (cells, cells, 3))
    pixels = (grey + light + colour).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)

# ---------------------------------------------------------------- digits
def draw_digit(label, size, font, rng):
    """A digit, white on black: slanted, stretched and moved at random."""
    canvas = Image.new("L", (4 * size, 4 * size))
    centre = (2 * size, 2 * size)
    thickness = round(rng.uniform(0, 0.2) * size)
    ImageDraw.Draw(canvas).text(centre, str(label), 255, font, anchor="mm", stroke_width=thickness)

    # Pillow asks for the map from new places to old ones: old = A (new - centre) + centre + shift
    A = np.diag(rng.uniform(0.9, 1.4, 2)) + rng.uniform(-0.35, 0.35, (2, 2))
    b = centre - A @ centre + rng.uniform(-0.3, 0.3, 2) * size
    matrix = (*A[0], b[0], *A[1], b[1])
    return canvas.transform(canvas.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR).reduce(4)

def make_digits(n, size, seed):
    """n grey digits (n, 1, size, size) in [0, 1], bent at random, and their labels (n,)."""
    rng = np.random.default_rng(seed)
    font = ImageFont.load_default(size=3.4 * size)
    labels = rng.integers(10, size=n)
    digits = torch.stack([to_tensor(draw_digit(label, size, font, rng)) for label in labels]) / 255
    bend = warp.random_field(n, (size, size), bend=0.04, shift=0.0, gen=torch.Generator().manual_seed(seed))
    return warp.resample(digits, bend), torch.from_numpy(labels)

def textures(n, size, gen):
    """n textures (n, 3, size, size) in [0, 1]: a colour, and octaves of noise, finer ones weaker; half grey."""
    image = 0.3 + 0.8 * (torch.rand(n, 3, 1, 1, generator=gen) - 0.5)
    for octave in range(1, 5):
        noise = torch.rand(n, 3, 2 ** octave, 2 ** octave, generator=gen) - 0.5
        image = image + 0.6 ** octave * nnf.interpolate(noise, (size, size), mode="bicubic")
    return torch.lerp(image.mean(1, keepdim=True), image, 0.5).clamp(0, 1)

def apply_look(look, x, seed):
    """Grey digits x (B, 1, S, S) in [0, 1] in the look of a domain: uint8 (B, 3, S, S)."""
    gen = torch.Generator().manual_seed(seed)
    if look == "source":
        return to_uint8(x).expand(-1, 3, -1, -1)

    scene = textures(len(x), x.shape[-1], gen)
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
Finger = namedtuple("Finger", "x y bones radius direction")  # its knuckle and lengths in palm lengths; radians
FINGERS = (  # index, middle, ring and little finger, thumb, as seen from the wrist; up is negative
    Finger(-0.30, -0.96, (0.46, 0.28, 0.22), 0.10, -0.14),
    Finger(-0.10, -1.00, (0.52, 0.32, 0.23), 0.10, -0.03),
    Finger(0.11, -0.95, (0.48, 0.30, 0.23), 0.10, 0.08),
    Finger(0.30, -0.84, (0.37, 0.22, 0.20), 0.09, 0.20),
    Finger(-0.40, -0.34, (0.36, 0.34, 0.24), 0.11, -0.65),
)

def pose_hand(rng):
    """Joints (5 fingers, 5, 3) of a random left hand: wrist, knuckle, two joints, tip; x, y, z to the camera."""
    joints = np.zeros((5, 5, 3))
    spread = rng.uniform(0.3, 1.7)
    fist = rng.uniform(0.2, 1.4) * rng.integers(2)  # half of the hands are open
    for joint, finger in zip(joints, FINGERS):
        joint[0, 0] = 0.45 * finger.x
        joint[1, :2] = finger.x, finger.y
        angle = spread * finger.direction + rng.uniform(-0.1, 0.1)
        curl = fist * rng.integers(2) + rng.uniform(0, 0.3)
        bend = 0.6 * curl
        for k, length in enumerate(finger.bones):
            way = math.sin(angle) * math.cos(bend), -math.cos(angle) * math.cos(bend), math.sin(bend)
            joint[k + 2] = joint[k + 1] + length * np.array(way)
            bend += curl

    turn = rng.uniform(-0.7, 0.7)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    joints[..., :2] = joints[..., :2] @ rotation.T
    joints[..., 2] += joints[..., :2] @ rng.uniform(-0.4, 0.4, 2)  # tilted to the camera or away from it
    return joints

def stroke(picture, start, end, radius, colour):
    """Draw a thick line with round ends; of the points only x and y count."""
    pen = ImageDraw.Draw(picture)
    colour = tuple(int(level) for level in colour)
    pen.line([*start[:2], *end[:2]], colour, round(2 * radius))
    pen.circle(tuple(start[:2]), radius, colour)
    pen.circle(tuple(end[:2]), radius, colour)

def draw_hand(size, rng):
    """Pictures of one hand as RGB, depth and X-ray, and its 17 landmarks (17, 2) in shares of the side."""
    side = 2 * size
    joints = pose_hand(rng)
    low = joints[:, 1:, :2].min((0, 1))
    high = joints[:, 1:, :2].max((0, 1))
    palm = rng.uniform(0.5, 0.8) * side / max(*(high - low), 1.4)  # its length in pixels: all fingers fit
    joints *= palm
    joints[..., :2] += rng.uniform(0.03, 0.97, 2) * (side - palm * (high - low)) - palm * low

    bones = []  # start, end, radius
    for i, finger in enumerate(FINGERS):
        bones.append((joints[i, 0], joints[i, 1], 0.13 * palm))
        for k in (1, 2, 3):
            bones.append((joints[i, k], joints[i, k + 1], finger.radius * palm))
    for wrist in joints[[0, 3], 0]:  # the arm leaves the picture
        bones.append((wrist, wrist + [0, 1.7 * palm, 0], 0.14 * palm))
    bones.sort(key=lambda bone: bone[0][2] + bone[1][2])  # far ones first

    rgb = clouds((side, side), 5, grey=rng.uniform(60, 180), contrast=60, rng=rng)  # mostly grey, as rooms are
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

    flesh = flesh.filter(ImageFilter.GaussianBlur(size / 24))
    light = np.linspace(*rng.uniform(0.6, 1, 2), side)  # a film is not evenly lit
    film = light * (20.0 + np.asarray(flesh) + np.asarray(skeleton))
    xray = Image.fromarray(film.clip(0, 255).astype(np.uint8))
    pictures = [add_noise(picture.reduce(2), rng).convert("RGB") for picture in (rgb, depth, xray)]
    landmarks = np.concatenate([joints[:4, 1:].reshape(16, 3), joints[4:, 4]])  # four fingers, the thumb's tip
    return pictures, landmarks[:, :2] / side

def make_hands(n, size, seed):
    """{"source": RGB, "depth", "xray": (n, 3, size, size)} and landmarks (n, 34), shares of the side."""
    rng = np.random.default_rng(seed)
    views = {"source": [], "depth": [], "xray": []}
    landmarks = []
    for _ in range(n):
        pictures, points = draw_hand(size, rng)
        landmarks.append(points.ravel())
        for view, picture in zip(views.values(), pictures):
            view.append(to_tensor(picture))
    return {name: torch.stack(view) for name, view in views.items()}, torch.tensor(np.array(landmarks)).float()

# ---------------------------------------------------------------- plants
Thing = namedtuple("Thing", "outline mark depth rgb warmth salient")  # shapes in shares of the sides; 1: near
Pairs = namedtuple("Pairs", "A B points salient")  # the last two are None where there are no landmarks
CIRCLE = np.array([[math.cos(a), math.sin(a)] for a in np.linspace(0, math.tau, 12, endpoint=False)])
POT = np.array([[-15, 0], [0, 0], [15, 0], [12, 12], [9, 24], [-9, 24], [-12, 12]]) / 100

def plant_scene(rng):
    """The things of a random scene, far ones first. Each has a bright mark, whose two ends are landmarks."""
    things = []
    for _ in range(5):
        place = rng.uniform([0.0, 0.7], [1.0, 1.0])
        stone = rng.uniform(0.05, 0.08) * CIRCLE
        mark = place + 0.5 * stone[[0, 6]]
        things.append(Thing(place + stone, mark, rng.uniform(0, 0.5), (0.8, 0.75, 0.65), 0.75, False))
        place = rng.uniform([0.0, 0.05], [1.0, 0.6])
        label = rng.uniform(0.06, 0.09) * CIRCLE[::3]
        mark = place + 0.5 * label[[0, 2]]
        things.append(Thing(place + label, mark, rng.uniform(0, 0.5), (0.15, 0.1, 0.2), 0.1, False))
    root = rng.uniform([0.38, 0.66], [0.62, 0.78])
    things.append(Thing(root + POT, root + 0.5 * POT[[2, 5]], 0.5, (0.7, 0.35, 0.2), 0.8, False))
    for _ in range(8):
        angle, length, width = rng.uniform([-3.0, 0.28, 0.06], [-0.14, 0.48, 0.09])
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-math.sin(angle), math.cos(angle)])
        t = np.linspace(0, 1, 9)[:, None]
        midrib = root + length * (t * along + rng.uniform(0, 0.6) * t ** 2 * [0, 1])  # it droops
        half = width * np.sin(np.pi * t) * across
        leaf = np.concatenate([midrib + half, (midrib - half)[::-1]])
        things.append(Thing(leaf, midrib[[3, 6]], rng.uniform(0.4, 1), (0.25, 0.6, 0.2), 0.2, True))
    return sorted(things, key=lambda thing: thing.depth)

def draw_scene(things, size, modality, rng):
    """A picture of the things; the ends of all marks (P, 2) in pixels; which of them are visible (P,)."""
    height, width = size
    sides = np.array([width, height])
    mode = "RGB" if modality == "rgb" else "L"
    picture = clouds((2 * width, 2 * height), 6, grey=rng.uniform(80, 130), contrast=25, rng=rng).convert(mode)
    owner = Image.new("L", (width, height))  # the number of the thing that a pixel shows
    pen, number_pen = ImageDraw.Draw(picture), ImageDraw.Draw(owner)
    for number, thing in enumerate(things, 1):
        levels = {"rgb": thing.rgb, "ir": [thing.warmth], "depth": [0.2 + 0.7 * thing.depth]}[modality]
        colour = 255 * np.array(levels)
        if modality != "depth":
            colour = colour * rng.uniform(0.75, 1.25, len(colour))
        pen.polygon((2 * sides * thing.outline).ravel().tolist(), tuple(colour.astype(int).tolist()))
        number_pen.polygon((sides * thing.outline).ravel().tolist(), number)
        if modality != "depth":  # a painted mark has no relief
            bright = (colour + 90).clip(0, 255).astype(int)
            pen.line((2 * sides * thing.mark).ravel().tolist(), tuple(bright.tolist()), width // 20)

    ends = sides * np.concatenate([thing.mark for thing in things])
    inside = ((ends > 0) & (ends < sides)).all(1)
    column, row = ends.astype(int).clip(0, sides - 1).T
    visible = inside & (np.asarray(owner)[row, column] == np.arange(2, 2 * len(things) + 2) // 2)
    return to_tensor(add_noise(picture.reduce(2), rng)), ends - 0.5, visible

def bend(points, knots):
    """A smooth field at points (P, 2) in [0, 1]: quadratic in x and in y, through 3x3 knots (3, 3, 2)."""
    p = points - 0.5
    x, y = np.stack([p * (2 * p - 1), 1 - 4 * p * p, p * (2 * p + 1)]).T  # Lagrange's polynomials, (P, 3)
    return np.einsum("pi,pj,ijk->pk", y, x, knots)

def make_plants(n, size, seed, modality="ir", rig=False):
    """n random pairs of size (H, W), misaligned by a smooth field and by parallax: A (n, 3, H, W), B (n, 1, H, W);
    landmarks (n, P, 4), pixels x, y in A, then in B, NaN where either hides it; salient (n, P): on the plant.
    rig: as from two cameras on one rig, offset and parallax are the same for all pairs, and the bend is smaller.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        knots, offset, parallax = rng.normal(0, BEND, (3, 3, 2)), rng.normal(0, SHIFT, 2), rng.normal(0, 0.03, 2)
        if rig:
            knots, offset, parallax = 0.35 * knots, 0.35 * offset + [0.07, 0.04], np.array([0.10, 0.0])
        things = plant_scene(rng)
        A, p_a, in_a = draw_scene(things, size, "rgb", rng)
        moved = []
        for thing in things:
            shift = offset + parallax * (thing.depth - 0.5)  # the nearer, the more parallax
            outline, mark = (points + bend(points, knots) + shift for points in (thing.outline, thing.mark))
            moved.append(thing._replace(outline=outline, mark=mark))
        B, p_b, in_b = draw_scene(moved, size, modality, rng)
        points = np.concatenate([p_a, p_b], axis=1)
        points[~(in_a & in_b)] = np.nan
        salient = torch.tensor([thing.salient for thing in things]).repeat_interleave(2)
        pairs.append((A, B, torch.tensor(points).float(), salient))
    return Pairs(*(torch.stack(part) for part in zip(*pairs)))

# ---------------------------------------------------------------- image files
@contextmanager
def opened(path):
    """An opened image file; whatever is wrong with it, also while it is read, becomes an InputError."""
    try:
        with Image.open(path) as image:
            pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo and its preview
            deep = ";16" in str(image.tile) and image.mode[0] not in "IF"  # Pillow would drop the low bytes
            if pages > 1 or deep or image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
                raise InputError(f"{path}: {pages} pages, {image.mode}{' of 16 bits' * deep}; save it as one picture, "
                                 "RGB of 8 bits or grey of any depth")
            yield image
    except InputError:
        raise
    except Exception as error:  # which one depends on the bytes of the file
        raise InputError(f"{path}: not a readable image ({error}); replace it") from None

def upright_size(image):
    """(width, height) of an opened image as viewers show it; landmarks are in pixels of that."""
    sideways = image.getexif().get(274) in (5, 6, 7, 8)  # EXIF's orientations that swap the sides
    if sideways and image.format != "TIFF":  # these Pillow turns by itself
        return image.size[::-1]
    return image.size

def stretch(pixels):
    """Deep pixels as 8 bits: from the .5 to the 99.5 percentile of the finite ones above the lowest value. That
    is padding, "no data" or an empty background wherever it is common: it alone becomes black."""
    finite = np.isfinite(pixels)
    inside = finite & (pixels > pixels[finite].min(initial=np.inf))
    levels = np.zeros(pixels.shape, np.uint8)
    if inside.any():
        low, high = np.percentile(pixels[inside], (0.5, 99.5))
        if low == high:
            low, high = pixels[inside].min(), pixels[inside].max()
        share = (pixels[inside] - low) / max(high - low, 1e-6)
        levels[inside] = (1 + 254 * share.clip(0, 1)).round()
    return Image.fromarray(levels)

def open_image(path, mode="RGB"):
    """The file as an upright picture of 8 bits, "RGB" or "L" (grey); what is transparent is laid on black."""
    with opened(path) as image:
        picture = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            picture = stretch(np.asarray(picture, np.float32))
        if picture.has_transparency_data:
            black = Image.new("RGBA", picture.size, "black")
            picture = Image.alpha_composite(black, picture.convert("RGBA"))
        return picture.convert("RGB").convert(mode)

def read_images(files, size, mode="RGB"):
    """The files as uint8 (N, C, H, W) of size (H, W), decoded in parallel."""
    height, width = size

    def read(path):
        return to_tensor(open_image(path, mode).resize((width, height), Image.Resampling.BILINEAR))

    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(read, files)))

def list_images(folder):
    """{stem: path} of the images of a folder, sorted; names that begin with a dot are some system's own."""
    files = [path for path in sorted(folder.glob("[!.]*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    found = {path.stem: path for path in files}
    if not files or len(found) < len(files):
        raise InputError(f"{folder}: no such folder, or no image in it, or two of one name; correct it")
    return found

def read_landmarks(table, columns, sides):
    """{stem: [row, ...]} of a csv `name,columns`: pixels of the stored, upright images as shares of their sides.
    sides {stem: (K,)}: for each of the K columns the width or the height of its image."""
    rows = {stem: [] for stem in sides}
    if not table.exists():
        raise InputError(f"{table}: no such file; README.md says what it holds")
    with open(table, newline="", encoding="utf-8-sig", errors="replace") as file:
        lines = csv.reader(file, skipinitialspace=True)
        if next(lines, None) != ["name", *columns]:
            raise InputError(f"{table}: its first line must be name,{','.join(columns)}; correct it")
        for name, *words in filter(None, lines):
            stem = name if name in sides else Path(name).stem
            try:
                row = np.array(words, float)
                if not ((row >= -1) & (row <= sides[stem])).all():
                    raise ValueError("a point is outside")
            except (KeyError, ValueError) as error:
                raise InputError(f"{table}, line {lines.line_num}: {','.join([name, *words])[:60]!r} is not an image "
                                 f"of this folder and {len(columns)} pixels inside it ({error}); correct it") from None
            rows[stem].append((row + 0.5) / sides[stem])
    return rows

# ---------------------------------------------------------------- what train.py asks for
def load_mnist(folder, split, size):
    """Images (N, 1, size, size) in [0, 1] and labels (N,) of MNIST's "train" or "t10k", plain or .gz."""
    arrays = []
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        path = Path(folder) / f"{split}-{kind}-ubyte"
        path = path if path.exists() else path.with_name(f"{path.name}.gz")
        if not path.exists():
            raise InputError(f"{path}: no such file; name MNIST's folder, or add --task hands")
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            magic, *shape = np.frombuffer(content, ">i4", 1 + dimensions).tolist()
            if magic != 0x800 + dimensions:  # 8: unsigned bytes
                raise ValueError("its first four bytes are those of another kind")
            arrays.append(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(f"{path}: damaged ({error}); fetch it again") from None
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
        if label not in list("0123456789") or not (split / name).is_file():
            raise InputError(f"{tables[0]}, line {number}: {line[:60]!r} is not `name digit` of an image; correct it")
        files.append(split / name)
        labels.append(int(label))
    return read_images(files, (size, size)), torch.tensor(labels)

def load_landmarks(folder, size):
    """Images (N, 3, size, size) and landmarks (N, 34) of a folder with images/ and landmarks.csv."""
    files = list_images(folder / "images")
    sides = {}
    for stem, path in files.items():
        with opened(path) as image:
            sides[stem] = np.tile(upright_size(image), 17)
    rows = read_landmarks(folder / "landmarks.csv", [f"{axis}{i}" for i in range(17) for axis in "xy"], sides)
    for stem, found in rows.items():
        if len(found) != 1:
            raise InputError(f"{files[stem]}: has {len(found)} lines in landmarks.csv, needs one; correct it")
    y = torch.tensor(np.concatenate(list(rows.values()))).float()
    return read_images(files.values(), (size, size)), y

def first(n, x, y):
    """The first n training images and their targets."""
    if n > len(x):
        raise InputError(f"--train {n}: there are only {len(x)} training images; ask for fewer")
    return x[:n], y[:n]

def add_unseen(domains, folders, read):
    """The domains, and those of the user's folders, named after them."""
    for folder in map(Path, folders):
        name = folder.resolve().name
        if name in domains:
            raise InputError(f"{folder}: a second domain of that name; rename the folder")
        domains[name] = read(folder)
    return domains

def load_digits(o):
    """Training images (N, 3, S, S), labels (N,), and the domains to measure: {name: (images, labels)}."""
    if o.data == "embedded":
        x, y = make_digits(o.train or 10_000, o.size, seed=2 * o.seed)
        x_test, y_test = make_digits(2000, o.size, TEST_SEED)
    else:
        x, y = load_mnist(o.data, "train", o.size)
        x, y = first(o.train or min(10_000, len(x)), x, y)
        x_test, y_test = load_mnist(o.data, "t10k", o.size)
    looks = UNSEEN_LOOKS if o.data == "embedded" and not o.unseen else ()
    domains = {look: (apply_look(look, x_test, seed=7), y_test) for look in ("source", *looks)}
    return apply_look("source", x, 0), y, add_unseen(domains, o.unseen, lambda f: load_mnist_m(f, o.size))

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
        x, y = first(o.train or int((~held_out).sum()), x[~held_out], y[~held_out])
    return x, y, add_unseen(domains, o.unseen, lambda folder: load_landmarks(folder, o.size))

def read_pairs(folder, size, modes):
    """The pairs of a split, A and B of one name, their landmarks in pixels at `size`; and the modes."""
    files = {"A": list_images(folder / "A"), "B": list_images(folder / "B")}
    for stem in files["A"].keys() ^ files["B"].keys():
        lonely = files["A"].get(stem, files["B"].get(stem))
        raise InputError(f"{lonely}: no partner of that name on the other side; add one or remove it")

    sides = {stem: [] for stem in files["A"]}
    found = {"A": "L", "B": "L"}  # grey, unless one of the files has colours
    for side in "AB":
        for stem in sides:
            with opened(files[side][stem]) as image:
                sides[stem] += upright_size(image)
                if image.mode[0] not in "1LIF":
                    found[side] = "RGB"
    modes = modes or found

    points = None
    if (folder / "landmarks.csv").exists():
        columns = ["xa", "ya", "xb", "yb"]
        rows = read_landmarks(folder / "landmarks.csv", columns, {s: np.array(four) for s, four in sides.items()})
        most = max(map(len, rows.values()))
        points = torch.full((len(sides), most, 4), torch.nan)
        for place, row in zip(points, rows.values()):
            place[:len(row)] = torch.tensor(np.reshape(row, (-1, 4)) * [*size[::-1], *size[::-1]] - 0.5)
    A, B = (read_images([files[side][stem] for stem in sides], size, modes[side]) for side in "AB")
    return Pairs(A, B, points, None), modes

def load_pairs(o, modes=None):
    """{"train": Pairs, "test": Pairs} and the modes {"A": "RGB" or "L", "B": ...}: found, or those of a run."""
    size = (o.height, o.width)
    if o.data == "embedded":
        train = make_plants(o.train, size, 2 * o.seed, o.modality, o.rig)
        test = make_plants(100, size, TEST_SEED, o.modality, o.rig)
        return {"train": train, "test": test}, {"A": "RGB", "B": "L"}
    train, modes = read_pairs(Path(o.data) / "train", size, modes)
    test = train  # for want of others
    if (Path(o.data) / "test").is_dir():
        test, _ = read_pairs(Path(o.data) / "test", size, modes)
    return {"train": train, "test": test}, modes

def augment(I_a, I_b, crop, gen):
    """A batch of pairs seen otherwise: both flipped or not, the same crop of both, A through one more field.
    Honest for unaligned pairs: what both undergo keeps their relation, the field adds to it.
    crop: share of the sides that may be cut off; a fifth of it is the bend of the field."""
    n, _, height, width = I_a.shape
    flip = torch.rand(n, 1, 1, 1, generator=gen, device=gen.device) < 0.5
    I_a, I_b = torch.where(flip, I_a.flip(3), I_a), torch.where(flip, I_b.flip(3), I_b)
    if crop > 0:
        cut = crop * torch.rand(n, 1, 1, 1, generator=gen, device=gen.device)
        centre = torch.rand(n, 2, 1, 1, generator=gen, device=gen.device)
        v = warp.pixel_grid(height, width, like=I_a)
        zoom = cut * (centre * v[..., -1:, -1:] - v)
        bend = warp.random_field(n, (height, width), crop / 5, 0.0, gen)
        I_a = warp.resample(warp.resample(I_a, zoom, "border"), bend, "border")
        I_b = warp.resample(I_b, zoom, "border")
    return I_a, I_b
