"""Geometry-preserving registration: R, T, D, the losses of eq. (4), (5), classical measures, one pair alone.

    I_a, I_b  images of modality A and B, (n, C, H, W) in [-1, 1], of any size, with any number of channels
    phi       R(I_a, I_b), a displacement field (n, 2, H, W) in pixels
    T         translates A's look into B's
    D         conditional patch discriminator: is this the B that belongs to I_a?
    O_RT = R_S(T(I_a), phi)   translate first
    O_TR = T(R_S(I_a, phi))   register first
Both orders share one phi. If T also moved things, T(I)[v] = I[v + t], then O_RT[v] = I_a[v + phi(v) + t], but
O_TR[v] = I_a[v + t + phi(v + t)]: they agree only where phi is constant. Where it varies, T must not move."""
import torch
import torch.nn as nn
import torch.nn.functional as nnf

import warp

SLOPE = 0.2  # of all leaky ReLUs, and in Kaiming's initial weights
MEASURES = ("l1", "correlation", "ncc", "ncc-edges", "mind")
LEVELS = ((64, 2), (64, 3), (128, 3), (128, 4), (128, 6), (256, 8))  # of `optimise`: longest side, knots

# ---------------------------------------------------------------- layers; w is a width
def conv(c_in, c_out, kernel=3, stride=1, bias=True, scale=1.0):  # with Kaiming's weights, times scale
    layer = nn.Conv2d(c_in, c_out, kernel, stride, (kernel - 1) // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, a=SLOPE)
    layer.weight.data *= scale
    return layer

def conv_relu(c_in, c_out, kernel=3, stride=1):
    return nn.Sequential(conv(c_in, c_out, kernel, stride), nn.LeakyReLU(SLOPE))

def conv_norm_relu(c_in, c_out, kernel=3, stride=1):  # the norm takes the mean away, and with it any bias
    layer = conv(c_in, c_out, kernel, stride, bias=False)
    return nn.Sequential(layer, nn.InstanceNorm2d(c_out), nn.LeakyReLU(SLOPE))

def up_norm_relu(c_in, c_out):  # doubles the size, as in CycleGAN's generator
    layer = nn.ConvTranspose2d(c_in, c_out, 3, stride=2, padding=1, output_padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, a=SLOPE)
    return nn.Sequential(layer, nn.InstanceNorm2d(c_out), nn.LeakyReLU(SLOPE))

class Residual(nn.Module):  # x + f(x), f two convolutions with InstanceNorm
    def __init__(self, w):
        super().__init__()
        self.f = nn.Sequential(conv_norm_relu(w, w), conv(w, w, bias=False), nn.InstanceNorm2d(w))

    def forward(self, x):
        return x + self.f(x)

def pad(I, multiple):  # repeats last row and column to a size at which no InstanceNorm sees a single pixel
    return nnf.pad(I, (0, -I.shape[3] % multiple, 0, -I.shape[2] % multiple), mode="replicate")

# ---------------------------------------------------------------- networks; a, b: channels of A and B
class UNet(nn.Module):  # R of the paper: a U-Net with residual blocks on the way down and before the output
    def __init__(self, a, b, w):
        super().__init__()
        self.first = conv_relu(a + b, w)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for c_in, c_out in ((w, 2 * w), (2 * w, 4 * w), (4 * w, 4 * w), (4 * w, 4 * w)):
            self.down.append(nn.Sequential(conv_relu(c_in, c_out, stride=2), Residual(c_out)))
            self.up.insert(0, conv_relu(c_out + c_in, c_in))
        self.last = nn.Sequential(Residual(w), Residual(w), conv(w, 2, scale=0.1))  # phi starts near 0

    def forward(self, I_a, I_b):
        height, width = I_a.shape[2:]
        skips = [self.first(pad(torch.cat([I_a, I_b], 1), 32))]
        for down in self.down:
            skips.append(down(skips[-1]))
        x = skips.pop()
        for up in self.up:
            x = up(torch.cat([nnf.interpolate(x, scale_factor=2, mode="bilinear"), skips.pop()], 1))
        return self.last(x)[..., :height, :width].float()

class Pyramid(nn.Module):  # R, coarse to fine: warp A's features by phi, compare them with B's, correct phi
    def __init__(self, a, b, w):
        super().__init__()
        def encoder(c_in):
            return nn.Sequential(conv_relu(c_in, w, stride=2), conv_relu(w, w))
        self.encode_a = nn.ModuleList(encoder(c_in) for c_in in (a, w, w))
        self.encode_b = nn.ModuleList(encoder(c_in) for c_in in (b, w, w))
        self.correct = nn.ModuleList(nn.Sequential(  # phi starts near 0
            conv_relu(2 * w + 2, 2 * w), conv_relu(2 * w, w), conv(w, 2, scale=0.1)) for _ in range(2))

    def forward(self, I_a, I_b):
        height, width = I_a.shape[2:]
        features = [(pad(I_a, 8), pad(I_b, 8))]
        for encode_a, encode_b in zip(self.encode_a, self.encode_b):
            a, b = features[-1]
            features.append((encode_a(a), encode_b(b)))
        phi = torch.zeros(len(I_a), 2, 1, 1, device=I_a.device)  # of one pixel: the first level resizes it
        for (a, b), correct in zip(reversed(features), self.correct):  # 1/8, 1/4; phi is smooth: no finer
            phi = warp.resize_field(phi, a.shape[2:])
            for _ in range(2):
                phi = phi + correct(torch.cat([warp.resample(a, phi, "border"), b, phi], 1)).float()
        return warp.resize_field(phi, features[0][0].shape[2:])[..., :height, :width]

class Translator(nn.Module):  # T: CycleGAN's generator, or, without blocks, what can hardly move anything
    def __init__(self, a, b, w, blocks):
        super().__init__()
        if blocks == 0:
            self.net = nn.Sequential(conv_relu(a, w), conv(w, b))
            return
        self.net = nn.Sequential(
            conv_relu(a, w, 7), conv_norm_relu(w, 2 * w, stride=2),
            conv_norm_relu(2 * w, 4 * w, stride=2), *[Residual(4 * w) for _ in range(blocks)],
            up_norm_relu(4 * w, 2 * w), up_norm_relu(2 * w, w), conv(w, b, 7))

    def forward(self, I_a):
        height, width = I_a.shape[2:]
        return torch.tanh(self.net(pad(I_a, 8))[..., :height, :width].float())

class Discriminator(nn.Module):  # D, that of pix2pix: a logit for each patch of I_a beside I_b or a fake
    def __init__(self, a, b, w):
        super().__init__()
        self.net = nn.Sequential(conv_relu(a + b, w, 4, stride=2), conv_norm_relu(w, 2 * w, 4, stride=2),
                                 conv_norm_relu(2 * w, 4 * w, 4, stride=2),
                                 conv_norm_relu(4 * w, 8 * w, 4), conv(8 * w, 1, 4))

    def forward(self, I_a, I):
        return self.net(pad(torch.cat([I_a, I], 1), 32)).float()

def build(o, a, b):  # R, T, D for a and b channels, untrained; R alone has the identity for T, and no D
    R = {"pyramid": Pyramid, "unet": UNet}[o.registration](a, b, o.R_width)
    T = Translator(a, b, o.T_width, o.T_blocks) if o.similarity == "translation" else nn.Identity()
    return R, T, Discriminator(a, b, o.D_width) if o.adversarial > 0 else None

# ---------------------------------------------------------------- losses
def adversarial(logits, real):
    """A term of eq. (5), negated: -log D if `real`, else -log(1 - D), D = sigmoid(logits). R and T want their
    fakes called real: minimizing what D maximizes would give no gradient from a D that is sure."""
    return nnf.softplus(-logits if real else logits).mean()

def local_mean(I, window):  # around each pixel; of (n C, H, W), as one channel in channels_last is slow
    means = nnf.avg_pool2d(I.flatten(0, 1), window, 1, window // 2, count_include_pad=False)
    return means.view(I.shape)

def correlation(I, J, window):  # at every pixel, in [-1, 1]; damped where one deviates by 0.1 or less
    mean_i, mean_j = local_mean(I, window), local_mean(J, window)
    var_i = (local_mean(I * I, window) - mean_i * mean_i).clamp_min(0)
    var_j = (local_mean(J * J, window) - mean_j * mean_j).clamp_min(0)
    cov = local_mean(I * J, window) - mean_i * mean_j
    return cov / ((var_i + 0.01) * (var_j + 0.01)).sqrt()

def edges(I):  # slope of the smoothed grey image (n, 1, H, W), -1 where flat; Canny's has no gradient
    grey = local_mean(I.mean(1, keepdim=True), 5)
    slope = warp.norm(torch.cat(torch.gradient(grey, dim=(2, 3)), 1))[:, None]
    return 4 * slope - 1  # a step from -1 to 1 makes .6

def mind(I):
    """Modality independent neighbourhood descriptor (n, 8, H, W), Heinrich et al. 2012: exp((min d - d) / v),
    d the mean squared difference of the 3x3 patches at a pixel and at each of its neighbours, v the mean d.
    It tells in which directions an image stays the same, and nothing of its greys."""
    grey = I.mean(1, keepdim=True)
    shifted = nnf.unfold(nnf.pad(grey, (1, 1, 1, 1), mode="replicate"), 3).unflatten(2, grey.shape[2:])
    neighbours = torch.cat([shifted[:, :4], shifted[:, 5:]], 1)  # 4 is the pixel itself
    d = local_mean((neighbours - grey).square(), 3)
    v = d.mean(1, keepdim=True)
    v = v + 0.01 * v.mean((2, 3), keepdim=True) + 1e-8  # the noise of flat ground is no structure
    return torch.exp(-(d - d.amin(1, keepdim=True)) / v)

def mismatch(measure, I, J, window):
    """How little I and J match at each pixel. "ncc" is squared: B may show the contrasts of A inverted."""
    if measure == "l1":
        return (I - J).abs()
    if measure == "correlation":
        return 1 - correlation(I, J, window)
    if measure == "ncc":
        return 1 - correlation(I.mean(1, keepdim=True), J.mean(1, keepdim=True), window) ** 2
    if measure == "ncc-edges":
        return 1 - correlation(edges(I), edges(J), window)
    return (mind(I) - mind(J)).abs()

def distance(measure, I, J, window, scales):
    """The mean mismatch over pixels and scales 1, 1/2, ...: coarse ones see what is far away. "l1", as in
    eq. (4), rewards a field that pulls blank ground over what does not fit yet; "correlation" hardly."""
    total = 0.0
    for _ in range(scales):
        total += mismatch(measure, I, J, window).mean()
        I, J = (nnf.avg_pool2d(image, 2, ceil_mode=True) for image in (I, J))
    return total / scales

# ---------------------------------------------------------------- phi of one pair, without training
def descriptors(images, side):  # MIND of each, averaged down by a whole number, to a longest side near `side`
    scale = max(1, round(max(images[0].shape[2:]) / side))
    size = [max(1, length // scale) for length in images[0].shape[2:]]
    return [mind(nnf.adaptive_avg_pool2d(I, size)) for I in images]

def unlikeness(a, b, phi):  # (n,): mean |R_S(a, phi) - b| where a is seen; else phi would push misfits out
    with_ones = torch.cat([a, torch.ones_like(a[:, :1])], 1)  # a 9th channel: 1 inside of a, 0 outside
    moved, seen = warp.resample(with_ones, phi).split((8, 1), 1)
    return (moved - seen * b).abs().mean(1).sum((1, 2)) / seen.sum((1, 2, 3)).clamp_min(1)

def best_of(fields, losses):  # of several fields (n, 2, H, W), the one of least loss (n,) for each pair
    best = torch.stack(losses).argmin(0)
    return torch.stack(fields)[best, torch.arange(len(best))]

@torch.enable_grad()
def optimise(I_a, I_b, start=None):
    """The phi (n, 2, H, W) of least unlikeness of MIND + 20 bending, by Adam over phi, pair by pair: no T, no
    D. From the best of `start` (R's phi; else 0) and 169 translations; each of LEVELS adds a finer `change`.
    What matches no better than at the start, or hardly better than with B mirrored, gets its start back."""
    phi = start = I_b.new_zeros(len(I_b), 2, *I_b.shape[2:]) if start is None else start
    for side, knots in LEVELS:
        a, b = descriptors((I_a, I_b), side)
        coarser = warp.resize_field(phi, b.shape[2:])
        if phi is start:  # the first level: begin at the best of 169 translations and the start
            fields = [warp.scaled(0 * coarser + 1, i % 13 - 6, i // 13 - 6) for i in range(169)] + [coarser]
            coarser = best_of(fields, [unlikeness(a, b, field) for field in fields])
        change = torch.zeros(len(b), 2, knots, knots, device=b.device, requires_grad=True)
        optimizer = torch.optim.Adam([change], lr=0.5)  # pixels
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.88)  # to .02 in 25 steps
        for _ in range(25):
            phi = coarser + nnf.interpolate(change, size=b.shape[2:], mode="bicubic", align_corners=True)
            loss = unlikeness(a, b, phi) + 20 * warp.bending(phi)  # 20: why, says results/README.md
            optimizer.zero_grad()
            loss.sum().backward()  # no pair sees another
            optimizer.step()
            schedule.step()
        phi = warp.resize_field(phi.detach(), start.shape[2:])
    return torch.where(is_match(I_a, I_b, phi, start)[:, None, None, None], phi, start)

def image_unlikeness(I_a, I_b, phi):  # of two images, at one size for all, so that its values compare
    a, b = descriptors((I_a, I_b), 128)
    return unlikeness(a, b, warp.resize_field(phi, b.shape[2:]))

def is_match(I_a, I_b, phi, start):  # (n,): better than `start`, 12 % better than with B mirrored: chance
    chance = torch.stack([image_unlikeness(I_a, I_b.flip(s), phi) for s in (2, 3, (2, 3))]).amin(0)
    return image_unlikeness(I_a, I_b, phi) < torch.minimum(image_unlikeness(I_a, I_b, start), 0.88 * chance)
