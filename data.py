"""Data, embedded and real, as uint8 images (N,C,H,W). Points are (x, y) pixels, the first one (0, 0).

A *look* turns grey digits (white on black) into colour images of one domain: networks train on `source`, DEV
looks choose settings, UNSEEN looks are measured. A bad file is a ValueError with its name, line and remedy.
"""
import contextlib, functools, gzip, hashlib, math, os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageOps
import warp

DIGITS = [  # control points xxyy of the one or two smooth strokes of 0, 1, ..., 9, in a box of side 100
    "5008 2022 1655 3088 6292 8260 7825 5008", "3426 4418 5308/5308 5350 5392",
    "2028 3410 6208 7828 6252 3872 2090/2090 5090 8288", "2216 5007 7420 6642 4448/4448 7254 8074 6092 2286",
    "3610 3030 2252 5056 8054/6812 6650 6294", "7610 5010 3012/3012 2745 5042 7655 7480 5093 2086",
    "6608 3826 2258 2886 5493 7676 6455 4056 2572", "2012 5012 8010/8010 6240 5066 4294",
    "5050 2636 3014 5207 7218 6838 5050/5050 2464 2888 5293 7684 7464 5050",
    "7428 6009 3412 2434 4250 6644 7428/7428 7260 6494"]
FINGERS = torch.tensor([  # index to little, thumb: knuckle x, y, z, three bones, radius; direction (radians)
    [-.30, -.96, 0, .46, .28, .22, .10, -.14], [-.10, -1.0, 0, .52, .32, .23, .10, -.03],
    [.11, -.95, 0, .48, .30, .23, .095, .08], [.30, -.84, 0, .37, .22, .20, .085, .20],
    [-.40, -.34, 0, .36, .34, .24, .11, -.65]])  # from the wrist, in palm lengths
THINGS = torch.tensor([  # stones, labels, pot, rim, stem, leaves: how many, on the plant?, red, green, blue,
    # warmth; from, to: root x, y, angle (radians), length, radius, in shares of the side, depth (1: near)
    [5, 0, .85, .80, .7, .80, 0, 1, .7, 1, 0, .5, .02, .05, .03, .06, .1, .5],
    [4, 0, .15, .10, .2, .10, 0, 1, 0, .7, -.4, .4, .08, .14, .04, .06, 0, .5],
    [1, 0, .70, .35, .2, .80, .40, .44, .83, .87, 0, 0, .14, .18, .07, .09, .4, .6],
    [1, 0, .70, .35, .2, .80, .34, .38, .75, .77, 0, .1, .24, .28, .025, .04, .4, .6],
    [1, 1, .40, .50, .2, .40, .48, .52, .72, .75, 1.4, 1.7, .4, .5, .014, .024, .4, .6],
    [8, 1, .25, .60, .2, .18, .46, .54, .3, .65, -.4, 3.5, .24, .45, .045, .08, .4, 1]])
MISALIGNED = .075, .03  # bend and shift of the embedded plants, in `warp.random_field`
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}

def noise(n, gen):
    """Uniform: rand(*shape) and between(low, high, *shape) are (n,*shape), each(low, high) is (n,1,1,1)."""
    rand = functools.partial(torch.rand, n, generator=gen, device=gen.device)
    def between(low, high, *shape):
        return low + (high - low) * rand(*shape)
    return rand, between, lambda low, high: between(low, high, 1, 1, 1)
def to_uint8(images):
    """Images clamped to [0,1] and rounded to their 256 levels."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)

# ---------------------------------------------------------------- embedded digits
def _curve(text):
    """13 points of a smooth curve through the control points, centred."""
    p = torch.tensor([divmod(int(point), 100) for point in text.split()]) / 100 - .5
    return nnf.interpolate(p.T[None, :, None], (1, 13), mode="bicubic", align_corners=True)[0, :, 0].T
def near_segments(start, end, radius, size):
    """Of each segment its radius (B,1,1,1), and for each pixel (B,1,H,W) the nearest place on it, 0 to 1, and
    the distance. start, end (B,S,2) and radius (B,S), or (B,1) for all, in pixels; size (H,W)."""
    ys, xs = (torch.arange(side).to(start) for side in size)
    segments = torch.cat([start, end - start, radius.expand(start.shape[:2])[..., None]], 2)
    for a_x, a_y, d_x, d_y, r in segments.permute(1, 2, 0)[..., None, None, None]:
        x, y = xs - a_x, ys[:, None] - a_y  # (B,1,1,W) and (B,1,H,1): no (B,H,W,2) is ever made
        along = ((x * d_x + y * d_y) / (d_x * d_x + d_y * d_y).clamp_min(1e-6)).clamp(0, 1)
        yield r, along, ((x - along * d_x).square() + (y - along * d_y).square()).sqrt()
def draw_strokes(start, end, radius, size, softness=.7):
    """Coverage (B,1,H,W) of these segments: max over them of (radius - distance)/softness + 1/2, in [0,1]."""
    covers = ((r - distance) / softness + .5 for r, _, distance in near_segments(start, end, radius, size))
    return functools.reduce(torch.maximum, covers).clamp(0, 1)
def make_digits(n, size, seed):
    """n grey digits (n,1,size,size) in [0,1], white on black, bent and placed at random, and labels (n,)."""
    gen, parts = torch.Generator().manual_seed(seed), []
    strokes = torch.stack([_curve(s) for t in DIGITS for s in (t.split("/") * 2)[:2]])  # one counts twice
    for count in [min(500, n - i) for i in range(0, n, 500)]:
        _, between, _ = noise(count, gen)
        labels = torch.randint(10, (count,), generator=gen)
        p = strokes.view(10, 2, 13, 2)[labels]
        p = p + .1 * between(-1, 1, 1, 1, 2) * torch.sin(5 * p.flip(-1) + between(0, math.tau, 1, 1, 2))
        linear = torch.diag_embed(between(.45, .8, 1, 2)) + between(-.2, .2, 1, 2, 2)
        p = (p @ linear + .5 + between(-.07, .07, 1, 1, 2)) * size - .5
        ends = p[:, :, :-1].flatten(1, 2), p[:, :, 1:].flatten(1, 2)
        parts.append((draw_strokes(*ends, between(.025, .06, 1) * size, (size, size)), labels))
    return tuple(torch.cat(part) for part in zip(*parts))
def textures(n, size, gen, roughness=(.5, 1.)):
    """n natural-looking textures (n,3,size,size) in [0,1]: octaves of noise, mixed colours, a few edges."""
    rand, _, each = noise(n, gen)
    fall, cloud, ramp = each(*roughness), 0., torch.linspace(-1, 1, size)
    for octave in range(5):
        cells = max(2, round(2 ** (octave + 1) * size / 32))
        cloud += fall ** octave * nnf.interpolate(rand(3, cells, cells) - .5, (size, size), mode="bicubic")
    cloud = cloud / cloud.std((1, 2, 3), keepdim=True)
    grey, tint = .05 + .65 * rand(1, 1, 1), .4 * (rand(3, 1, 1) - .5)
    mix = .8 + .2 * torch.eye(3) + .6 * (rand(3, 3) - .5)  # channels mostly go together
    colour = torch.einsum("nij,njhw->nihw", mix, cloud) * (.04 + .1 * rand(1, 1, 1)) + grey + tint
    for _ in range(2):  # half-planes of another colour: edges, as objects in a photograph make them
        angle, offset = 2 * np.pi * rand(1, 1, 1), 1.6 * rand(1, 1, 1) - .8
        side = torch.cos(angle) * ramp + torch.sin(angle) * ramp[:, None] - offset
        colour += (side * size / 4).clamp(0, 1) * (.5 * rand(1, 1, 1) - .25 + .4 * (rand(3, 1, 1) - .5))
    return colour.clamp(0, 1)
LOOKS = {  # each maps (B,C,S,S) in [0,1] to 1 or 3 channels; rand(*s) is (B,*s), scene() textures
    "source": lambda x, *_: x,
    "difference": lambda x, _, scene: (scene() - x).abs(),  # over coloured textures: MNIST-M's recipe
    "paint": lambda x, rand, scene: torch.lerp(scene((.2, .4)) * rand(3, 1, 1), .5 + .5 * rand(3, 1, 1), x),
    "chalk": lambda x, rand, scene: .3 * rand(*x.shape[1:]) - .15 + nnf.avg_pool2d(  # grain, smears, gaps
        x * (rand(*x.shape[1:]) > .4) + .5 * scene(), 3, 1, 1),
    "negative": lambda x, *_: 1 - x.mean(1, keepdim=True),
    "glass": lambda x, _, scene: .5 * x + .5 * scene((.3, .7))}
UNSEEN, DEV = ("difference", "paint", "chalk"), ("negative", "glass")
def apply_look(name, x, seed):
    """Images in [0,1] in the named look, as uint8 (B,3,S,S)."""
    gen, seen = torch.Generator().manual_seed(seed * len(LOOKS) + list(LOOKS).index(name)), []
    for part in x.split(500):
        rand, scene = noise(len(part), gen)[0], functools.partial(textures, len(part), x.shape[-1], gen)
        seen.append(to_uint8(LOOKS[name](part, rand, scene)).expand(-1, 3, -1, -1))
    return torch.cat(seen)

# ---------------------------------------------------------------- embedded plants
def plant_scene(n, gen):
    """The things of n random scenes as they are painted, strokes that bend under their weight, of side 1:
    points (n,5,2) from the root, radius (n,4), depth (n,1,1), red, green, blue, warm, near (n,5,1,1)."""
    rand, between, _ = noise(n, gen)
    camera, t = between(-.15, .15, 1, 2), torch.linspace(0, 1, 5)[:, None]
    for kind in THINGS:
        for i in range(int(kind[0])):
            x, y, angle, length, radius = (between(*r, 1, 1) for r in kind[6:16].view(5, 2))
            down = between(0, 1.4, 1, 1) * length * t - angle.sin()
            points = torch.cat([x + length * t * angle.cos(), y + length * t * down], 2) + camera
            depth = torch.lerp(*kind[16:], (i + rand(1, 1)) / kind[0])
            paint = torch.cat([kind[2:6, None] * between(.6, 1.3, 4, 1), .2 + .75 * depth], 1)
            yield points, radius[..., 0] * torch.tensor([.6, 1., .95, .5]), depth, paint[..., None]
def make_plants(n, size, seed, modality="ir"):
    """n random pairs of size (H,W), uint8: A (n,3,H,W), and B (n,1,H,W), which is seen through a smooth field
    and parallax by depth; landmarks (n,P,4), pixels x, y in A, then B, of the ends of a bright mark on each
    thing (without relief), NaN if hidden; salient (P,): on the plant."""
    gen, sides, parts = torch.Generator().manual_seed(seed), torch.tensor(size[::-1]), []
    wall, of_b = torch.tensor([.3, .3, .3, .3, 0]).view(5, 1, 1), {"ir": 3, "depth": 4}[modality]
    for count in [min(50, n - i) for i in range(0, n, 50)]:
        rand, _, each = noise(2 * count, gen)  # all scenes as A sees them, then as B does
        bend = warp.random_field(count, size, *MISALIGNED, gen)
        parallax = torch.randn(count, 1, 2, generator=gen) * .03 * sides
        view = wall + each(0, .3) + .2 * nnf.interpolate(rand(5, 6, 6) - .5, size, mode="bicubic")
        owner, places = torch.zeros(2 * count, 1, *size), []
        for number, (points, radius, depth, paint) in enumerate(plant_scene(count, gen), 1):
            a = points * sides - .5
            b = warp.warp_points(a, -bend, 1) + parallax * (depth - .5)  # one step: a + bend(a)
            p, radius, paint = torch.cat([a, b]), min(size) * radius.repeat(2, 1), paint.repeat(2, 1, 1, 1)
            cover = draw_strokes(p[:, :-1], p[:, 1:], radius, size)
            mark = draw_strokes(p[:, 1:3], p[:, 2:4], radius[:, 1:3] / 5, size)
            view = torch.lerp(view, (paint + .35 * mark * (wall > 0)).clamp(0, 1), cover)  # not in depth
            owner = torch.where(cover > .5, number, owner)
            places.append(p[:, 1::2])
        places, owners = torch.cat(places, 1), torch.arange(1, number + 1).repeat_interleave(2)
        seen = warp.look_up(owner, places.round().transpose(1, 2)[..., None])[:, 0, :, 0].round() == owners
        visible = seen.view(2, count, -1, 1).all(0)
        A, B = to_uint8(view * each(.8, 1.2) + .02 * torch.randn(view.shape, generator=gen)).chunk(2)
        points = torch.where(visible, torch.cat(places.chunk(2), 2), torch.nan)
        parts.append((A[:, :3], B[:, of_b:of_b + 1], points))
    return *(torch.cat(p) for p in zip(*parts)), THINGS[:, 1].repeat_interleave(2 * THINGS[:, 0].int()) > 0

# ---------------------------------------------------------------- embedded hands
def hand_bones(n, size, gen):
    """n random left hands, open or bent, palm and z to the camera, landmarks in a square of side `size`:
    bones (n,22,2,3), start, end, pixels x, y, z, 5 of the palm, 2 of the arm, 3 a finger; radius (n,22)."""
    rand, between, _ = noise(n, gen)
    fan = FINGERS[:, 7] * between(.3, 1.7, 1) + between(-.1, .1, 5)
    curl = between(0, 1.5, 5) * torch.where(rand(1) < .5, .2, rand(5).round()) * torch.tensor([1] * 4 + [.5])
    wrist = FINGERS[:, :3] * torch.tensor([.45, 0, 0]) + torch.tensor([0, .05, 0])
    bend, joints = .6 * curl + between(-.1, .2, 5), [p.expand(n, 5, 3) for p in (wrist, FINGERS[:, :3])]
    for length, more in zip(FINGERS[:, 3:6, None].unbind(1), (1., .8, 0.)):
        way = torch.stack([fan.sin() * bend.cos(), -fan.cos() * bend.cos(), bend.sin()], -1)
        joints.append(joints[-1] + way * length * between(.9, 1.1, 5, 1))
        bend = bend + more * curl
    arm = torch.tensor([[[x, .1, 0], [x, 1.7, 0]] for x in (-.1, .1)]).expand(n, 2, 2, 3)
    rays = torch.stack([torch.stack(joints[:-1], 2), torch.stack(joints[1:], 2)], 3)  # (n,5,4,2,3)
    skew = torch.linalg.cross(between(-1, 1, 3)[:, None] * torch.tensor([.4, .6, .7]), torch.eye(3)[None])
    bones = torch.cat([rays[:, :, 0], arm, rays[:, :, 1:].flatten(1, 2)], 1) @ torch.matrix_exp(skew)[:, None]
    low, high = bones[:, 7:, :, :2].flatten(1, 2).aminmax(dim=1)
    scale = size * between(.45, .8, 1) / (high - low).amax(1, keepdim=True).clamp_min(1.4)
    corner = between(.03, .97, 2) * (size - (high - low) * scale) - low * scale - .5
    bones = bones * scale[:, None, None] + nnf.pad(corner, (0, 1))[:, None, None]
    thick = (FINGERS[:, 6:7] * torch.tensor([.95, .88, .8])).flatten()
    return bones, torch.cat([torch.tensor([.13] * 5 + [.15] * 2), thick]) * between(.85, 1.15, 1) * scale
def make_hands(n, size, seed):
    """{"source": RGB, "depth", "xray": (n,3,size,size) uint8} of n random hands, and their 17 landmarks
    (n,34), x, y as shares of the side: knuckle to tip of index, middle, ring, little finger; thumb's tip."""
    gen, parts, ramp = torch.Generator().manual_seed(seed), [], torch.linspace(-1, 1, size)
    tips = [2 * bone + end for bone in (7, 10, 13, 16) for end in (0, 1, 3, 5)] + [2 * 21 + 1]
    for count in [min(250, n - i) for i in range(0, n, 250)]:
        rand, between, each = noise(count, gen)
        def slope():
            return each(-1, 1) * ramp + each(-1, 1) * ramp[:, None]
        bones, radius = hand_bones(count, size, gen)
        cover = flesh = bone = torch.zeros(count, 1, size, size)
        front, unit = cover - 1e3, radius[:, :1, None, None] / .13
        for i, (r, along, away) in enumerate(near_segments(*bones[..., :2].unbind(2), radius, (size, size))):
            here, bulge = ((r - away) / .8 + .5).clamp(0, 1), (r * r - away * away).clamp_min(0)
            cover, flesh = torch.maximum(cover, here), flesh + bulge
            z = torch.lerp(*bones[:, i, :, 2:, None, None].unbind(1), along) + bulge.sqrt()
            front = torch.maximum(front, torch.where(here > 0, z, -1e3))  # the z-buffer
            core = r * (.28 + .2 * (2 * along - 1) ** 4)  # bones are thicker at their ends, joints are gaps
            bone = bone + ((core - away) / .8 + .5).clamp(0, 1) * ((along > .03) & (along < .97))
        on_hand, bone, flesh, z = cover > .5, bone.clamp(0, 1), flesh.sqrt() / unit, front / unit
        # RGB: skin in the light of a lamp, before textures and things
        scene, (a, b) = textures(count, size, gen, (.3, .6)), (size * (1.2 * rand(2, 5, 2) - .1)).unbind(1)
        things = draw_strokes(a, torch.lerp(a, b, .3), size * between(.02, .1, 5), (size, size))
        scene = torch.lerp(scene, .1 + .6 * rand(3, 1, 1), things)
        scene = torch.lerp(scene.mean(1, keepdim=True), scene, .3)  # rooms are mostly grey
        height = nnf.avg_pool2d(torch.where(on_hand, z, -.1), 3, 1, 1) * 8
        dx, dy = nnf.pad(height.diff(dim=3), (0, 1)), nnf.pad(height.diff(dim=2), (0, 0, 0, 1))
        light = (1.1 - dx * each(-.6, .6) - dy * each(-.8, .2)) / (1 + dx ** 2 + dy ** 2).sqrt()
        skin = torch.lerp(*torch.tensor([[.95, .72, .6], [.45, .28, .2]])[..., None, None], each(0, 1))
        rgb = torch.lerp(scene, skin * light.clamp(.45, 1.3) * each(.8, 1.1) + .05 * slope(), cover)
        # depth: near is bright; a wall behind; the sensor sees nothing at some steep edges
        z = torch.where(on_hand, z, each(-1.6, -.8) + .2 * slope())
        steep = nnf.max_pool2d(z, 3, 1, 1) + nnf.max_pool2d(-z, 3, 1, 1) > .4
        hole = steep & (rand(1, size, size) < .2) | (nnf.interpolate(rand(1, 16, 16), (size, size)) < .01)
        depth = torch.where(hole, 0., each(.4, .6) + each(.2, .3) * z)
        # X-ray: soft tissue, brighter bones, a film that is unevenly lit and ends at a dark border
        film, shade = each(.03, .3), 1 + .3 * slope()
        body = (.95 - film) * (.55 * (1 - torch.exp(-flesh * each(4, 8))) + each(.3, .5) * bone * cover)
        xray = torch.where(ramp.abs() < 1 - each(0, .25), film * shade + body * (.5 + .5 * shade), .02)
        views = [to_uint8(view + .02 * torch.randn(view.shape, generator=gen)).expand(-1, 3, -1, -1)
                 for view in (rgb, depth, xray)]
        parts.append((*views, (bones.flatten(1, 2)[:, tips, :2].flatten(1) + .5) / size))
    *views, points = (torch.cat(part) for part in zip(*parts))
    return dict(zip(("source", "depth", "xray"), views)), points

# ---------------------------------------------------------------- image files
@contextlib.contextmanager
def blaming(path, problem, remedy):
    """Whatever is wrong with the file that is read inside becomes a ValueError that names it."""
    try:
        yield
    except Exception as error:  # what Pillow and zlib raise depends on the bytes
        raise ValueError(f"{path}: {problem} ({error}); {remedy}") from None

def open_image(path, channels=3, low=0., high=65535.):
    """The file as an upright RGB (or grey) picture of 8 bits; deeper ones are stretched from [low, high]."""
    with blaming(path, "not a readable image", "replace it"), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            stretched = (np.asarray(image, np.float32) - low) / max(high - low, 1e-6)
            image = Image.fromarray((255 * stretched.clip(0, 1)).round().astype(np.uint8))
        return image.convert("RGB" if channels == 3 else "L")
def as_tensor(image, size):
    """A picture as (C,H,W) uint8 of size (H,W)."""
    image = np.array(image.resize(size[::-1], Image.Resampling.BILINEAR))
    return torch.from_numpy(image.reshape(*size, -1)).permute(2, 0, 1)
def list_images(folder):
    """{stem: path} of the images in a folder, sorted. ValueError if there is none, or two of a stem."""
    files = [p for p in sorted(folder.glob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    if not files or len(files) != len({p.stem for p in files}):
        raise ValueError(f"{folder}: no such folder, or it holds no image, or two of one name; correct it")
    return {p.stem: p for p in files}

def cached_images(files, size, cache, reading=(3, 0., 65535.)):
    """The files as a memory map (N,C,H,W) uint8, decoded once, in parallel, into a file of `cache`."""
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr((size, reading, stats)).encode()).hexdigest()[:16]
    target = Path(cache) / f"{key}.npy"
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
        finally:  # a decoding that fails leaves nothing behind
            partial.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                target.parent.rmdir()  # of a new run
    return torch.from_numpy(np.load(target, mmap_mode="c"))
def inspect(files):
    """What the headers say: sizes (N,2) as width, height, and the last arguments of `open_image`: 3 channels
    if a file has colours, the .5 and 99.5 percentiles of the pixels of files deeper than 8 bits."""
    sizes, channels, deep = [], 1, []
    for path in files:
        with blaming(path, "not a readable image", "replace it"), Image.open(path) as image:
            turned = image.getexif().get(274, 1) >= 5  # EXIF orientations that swap width and height
            sizes.append(image.size[::-1] if turned else image.size)
            channels = channels if image.mode[0] in "1LIF" else 3
            if image.mode[0] in "IF":
                deep.append(np.asarray(image, np.float32).ravel()[::97])
    stretch = np.percentile(np.hstack(deep), (.5, 99.5)).tolist() if deep else (0., 65535.)
    return np.array(sizes), (channels, *stretch)
def read_landmarks(table, columns, sizes):
    """{stem: rows} of a csv `name,columns`: pixel coordinates as shares of sizes {stem: (width, ...)}."""
    found, lines = {stem: [] for stem in sizes}, table.read_text("utf-8-sig", "replace").rstrip().splitlines()
    if len(lines) < 2 or lines[0].replace(" ", "") != f"name,{columns}":
        raise ValueError(f"{table}: its first line must be name,{columns}, then a line per point; correct it")
    for number, line in enumerate(lines[1:], 2):
        needs = f"{line[:60]!r} needs an image of this folder and {columns}, points inside it"
        with blaming(f"{table}, line {number}", needs, "correct it"):
            name, *words = map(str.strip, line.split(","))
            stem = name if name in sizes else Path(name).stem
            place = np.array(words, np.float64).reshape(len(sizes[stem]))
            if not ((place >= -1) & (place <= sizes[stem])).all():
                raise ValueError("a point is outside")
            found[stem].append((place + .5) / sizes[stem])
    return found
def load_landmarks(folder, size, cache):
    """Images (N,3,size,size) uint8 and landmarks (N,34), as `make_hands` gives them, of a landmark folder."""
    files = list_images(folder / "images")
    (sizes, reading), columns = inspect(files.values()), ",".join(f"x{i},y{i}" for i in range(17))
    rows = read_landmarks(folder / "landmarks.csv", columns, dict(zip(files, np.tile(sizes, 17))))
    for stem, found in rows.items():
        if len(found) != 1:
            raise ValueError(f"{files[stem]}: has {len(found)} lines in landmarks.csv, needs one; correct it")
    images = cached_images(list(files.values()), (size, size), cache, (3, *reading[1:]))
    return images, torch.tensor(np.concatenate(list(rows.values()))).float()

def load_pairs(o, cache, reading=None):
    """{"train", "test": pairs} and how files are read (None: find out). Pairs: A, B (N,C,H,W) uint8; points
    and salient of `make_plants`, or None. Embedded test scenes know no seed; without test/ it is train/."""
    size, pairs = (o.height, o.width), {}
    for split, n, seed in (("train", o.train, 2 * o.seed), ("test", 100, 999_003)):
        if o.data == "embedded":
            A, B, points, salient = make_plants(n, size, seed, o.modality)
        else:
            folder, points, salient = Path(o.data) / split, None, None
            folder = folder if folder.is_dir() else folder.with_name("train")
            A, B = (list_images(folder / side) for side in "AB")
            for lonely in map((A | B).get, sorted(A.keys() ^ B.keys())):
                raise ValueError(f"{lonely}: no partner of that name on the other side; add or remove one")
            files = {"A": list(A.values()), "B": [B[stem] for stem in A]}
            sizes, found = zip(*map(inspect, files.values()))
            reading, table = reading or dict(zip("AB", found)), folder / "landmarks.csv"
            if table.exists():
                rows = read_landmarks(table, "xa,ya,xb,yb", dict(zip(A, np.hstack(sizes)))).values()
                rows = [torch.tensor(np.reshape(row, (-1, 4)) * (size[::-1] * 2) - .5) for row in rows]
                points = torch.nn.utils.rnn.pad_sequence(rows, True, torch.nan).float()
            A, B = (cached_images(files[side], size, cache, reading[side]) for side in "AB")
        pairs[split] = SimpleNamespace(A=A, B=B, points=points, salient=salient)
    return pairs, reading or {"A": (3, 0., 65535.), "B": (1, 0., 65535.)}

def augment(I_a, I_b, crop, deform, gen):
    """A batch of pairs seen otherwise: both flipped or not, the same crop of both, A through one more field.
    That is honest for unaligned pairs: what both undergo keeps their relation, the field adds to it."""
    rand, _, _ = noise(len(I_a), gen)
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
def load_mnist(folder, split, size):
    """Images (N,1,size,size) in [0,1], labels (N,) of MNIST's "train" or "t10k"; ValueError if damaged."""
    arrays = []
    for name, dims in ((f"{split}-images-idx3-ubyte", 3), (f"{split}-labels-idx1-ubyte", 1)):
        path = next((p for p in (Path(folder) / name, Path(folder) / f"{name}.gz") if p.exists()), None)
        if path is None:
            raise ValueError(f"{folder}: no {name}[.gz]; name MNIST's four files, or add --task hands")
        with blaming(path, "damaged, or not such an IDX file", "fetch it again"):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            kind, *shape = np.frombuffer(content, ">i4", 1 + dims)
            assert kind == 0x800 + dims, "its first four bytes say so"
            arrays.append(np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape))
    images, labels = map(torch.tensor, arrays)
    if len(images) != len(labels) or not len(images) or labels.max() > 9:
        raise ValueError(f"{folder}: {split} has {len(images)} images, and {len(labels)} labels up to "
                         f"{max(labels.tolist(), default=0)}, which must be 0-9; fetch the files again")
    images = nnf.interpolate(images[:, None] / 255, (size, size), mode="bilinear", antialias=True)
    return images.clamp(0, 1), labels.long()
def load_mnist_m(folder, size, cache):
    """Images (N,3,size,size) uint8 and labels of a split of MNIST-M: in folder and folder_labels.txt."""
    table, files, labels = folder.with_name(f"{folder.name}_labels.txt"), [], []
    for number, line in enumerate(table.read_text("utf-8", "replace").splitlines() or ["an empty file"], 1):
        needs = f"{line[:60]!r} is not `name digit` of an image in {folder}"
        with blaming(f"{table}, line {number}", needs, "correct it"):
            name, label = line.rsplit(maxsplit=1)
            labels.append(list("0123456789").index(label))
            files.append((folder / name).resolve(strict=True))
    return cached_images(files, (size, size), cache), torch.tensor(labels)
def make_mnist_m(digit, label, photos):
    """|photograph - digit| of grey digits (B,1,S,S) over random crops of photographs: (B,3,S,S), labels."""
    rng, size, crops = np.random.default_rng(0), digit.shape[-1], []
    scenes = [open_image(file) for file in list_images(photos).values()]
    for i in rng.integers(len(scenes), size=len(digit)):
        left, top = (rng.integers(max(1, side - size + 1)) for side in scenes[i].size)
        crops.append(as_tensor(scenes[i].crop((left, top, left + size, top + size)), (size, size)))
    return to_uint8((torch.stack(crops) / 255 - digit).abs()), label
def add_unseen(o, domains, read):
    """The domains, and those in the folders --unseen, as `read` gives them."""
    for folder in (Path(folder).resolve() for folder in o.unseen):
        if folder.name in domains or o.validate:
            raise ValueError(f"{folder}: a second domain of its name, rename it; or drop --validate")
        domains[folder.name] = read(folder)
    return domains
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
    looks = DEV if o.validate else UNSEEN if o.data == "embedded" and not o.unseen else ()
    domains = {name: (apply_look(name, test[0], 7), test[1]) for name in ("source", *looks)}
    def read(folder):
        released = [p for p in (folder / "mnist_m_test", folder / "mnist_m_train") if p.is_dir()]
        return load_mnist_m(released[0], o.size, cache) if released else make_mnist_m(*test, folder)
    return apply_look(o.look, digit[:o.train], 0), label[:o.train], add_unseen(o, domains, read)
def load_hands(o, cache):
    """As `load_digits`: RGB hands, landmarks, domains. Of a folder every tenth image is held out."""
    if o.data == "embedded":
        x, y = make_hands(o.train, o.size, 2 * o.seed)
        views, y_test = make_hands(500, o.size, 999_001 if o.validate else 999_002)
        x, domains = x["source"], {name: (view, y_test) for name, view in views.items()}
    else:
        x, y = load_landmarks(Path(o.data), o.size, cache)
        domains = {"source": (x[::10], y[::10])}
        x, y = (torch.cat([t[i::10] for i in range(1, 10)])[:o.train] for t in (x, y))
    if o.validate:
        x_test, y_test = domains["source"]
        domains = {look: (apply_look(look, x_test / 255, 7), y_test) for look in ("source", *DEV)}
    return x, y, add_unseen(o, domains, lambda folder: load_landmarks(folder, o.size, cache))
LOADERS = {"digits": load_digits, "hands": load_hands}
