"""Two-flow multi-modal registration: the networks and losses of the paper, and the classical measures.

    I_a, I_b  images of modality A and B (B,C,H,W) in [-1,1], of any size, with any number of channels
    R, T      phi = R(I_a, I_b), a displacement field (B,2,H,W) in pixels; T translates A's look into B's
    D         conditional patch discriminator: is this the B that belongs to I_a?
    O_RT = R_S(T(I_a), phi)  translate first          O_TR = T(R_S(I_a, phi))  register first
Both orders share one phi: if T moved anything, not both could match I_b. A step is `train.dual_flow_step`.
"""
import torch
import torch.nn as nn
import torch.nn.functional as nnf
import warp

# ---------------------------------------------------------------- networks: a, b channels of A and B, width w
def conv(c_in, c_out, kernel=3, stride=1, bias=True, scale=1.):
    """A convolution that keeps the size (over the stride), Kaiming-initialised, its weights times scale."""
    layer = nn.Conv2d(c_in, c_out, kernel, stride, (kernel - 1) // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, a=.2).data.mul_(scale)
    return layer
def conv_relu(c_in, c_out, kernel=3, stride=1, norm=False):
    layer = conv(c_in, c_out, kernel, stride, bias=not norm)  # InstanceNorm would take a bias away again
    return nn.Sequential(layer, nn.InstanceNorm2d(c_out) if norm else nn.Identity(), nn.LeakyReLU(.2))
def pad(I, multiple):
    """I with its last row and column repeated until the sides are multiples; the networks crop again."""
    return nnf.pad(I, (0, -I.shape[3] % multiple, 0, -I.shape[2] % multiple), "replicate")

class Residual(nn.Sequential):
    """x + f(x), f two convolutions with InstanceNorm."""
    def __init__(self, w):
        super().__init__(conv_relu(w, w, norm=True), conv(w, w, bias=False), nn.InstanceNorm2d(w))
    def forward(self, x):
        return x + super().forward(x)

class UNet(nn.Module):
    """R of the paper: U-Net, residual blocks on the way down and before the output, bilinear upsampling."""
    def __init__(self, a, b, w):
        super().__init__()
        steps = [(i * w, o * w) for i, o in ((1, 2), (2, 4), (4, 4), (4, 4))]
        self.first = conv_relu(a + b, w)
        self.down = nn.ModuleList(nn.Sequential(conv_relu(i, o, 3, 2), Residual(o)) for i, o in steps)
        self.up = nn.ModuleList(conv_relu(i + o, i) for i, o in reversed(steps))
        self.last = nn.Sequential(Residual(w), Residual(w), conv(w, 2, scale=.1))  # phi starts near 0
    def forward(self, I_a, I_b):
        x = [self.first(pad(torch.cat([I_a, I_b], 1), 32))]
        for layer in self.down:
            x.append(layer(x[-1]))
        for layer in self.up:
            low, skip = x.pop(), x.pop()
            x.append(layer(torch.cat([nnf.interpolate(low, size=skip.shape[-2:], mode="bilinear"), skip], 1)))
        return self.last(x[0])[..., :I_a.shape[2], :I_a.shape[3]].float()

class Pyramid(nn.Module):
    """R from coarse to fine: warp A's features by phi, compare them with B's, correct phi; twice a level.
    Levels are 1/2, 1/4 and 1/8 of the image; the finest that corrects phi is 1/4, which keeps phi smooth."""
    def __init__(self, a, b, w):
        super().__init__()
        self.encode_a, self.encode_b = (nn.ModuleList(
            nn.Sequential(conv_relu(i, w, 3, 2), conv_relu(w, w)) for i in (c, w, w)) for c in (a, b))
        self.correct = nn.ModuleList(nn.Sequential(
            conv_relu(2 * w + 2, 2 * w), conv_relu(2 * w, w), conv(w, 2, scale=.1)) for _ in range(2))
    def forward(self, I_a, I_b):
        features = [(pad(I_a, 8), pad(I_b, 8))]
        for encoders in zip(self.encode_a, self.encode_b):
            features.append([encode(I) for encode, I in zip(encoders, features[-1])])
        phi = I_a.new_zeros(len(I_a), 2, 1, 1, dtype=torch.float32)
        for correct, (a, b) in zip(self.correct, reversed(features)):
            phi = warp.resize_field(phi, a.shape[-2:])
            for _ in range(2):
                phi = phi + correct(torch.cat([warp.resample(a, phi, "border"), b, phi], 1)).float()
        return warp.resize_field(phi, features[0][0].shape[-2:])[..., :I_a.shape[2], :I_a.shape[3]]

class Translator(nn.Sequential):
    """T: two halvings, residual blocks, two doublings; or two convolutions of 3x3 alone; tanh."""
    def __init__(self, a, b, w, blocks):
        steps, kernel = ([(w, 2 * w), (2 * w, 4 * w)], 7) if blocks else ([], 3)
        layers = [conv_relu(a, w, kernel), *(conv_relu(i, o, 3, 2, norm=True) for i, o in steps),
                  *(Residual(4 * w) for _ in range(blocks))]
        for i, o in reversed(steps):
            layers += [nn.Upsample(scale_factor=2, mode="bilinear"), conv_relu(o, i, norm=True)]
        super().__init__(*layers, conv(w, b, kernel))
    def forward(self, I_a):
        return torch.tanh(super().forward(pad(I_a, 8))[..., :I_a.shape[2], :I_a.shape[3]].float())

class Discriminator(nn.Sequential):
    """D: a logit for each patch of images of c channels in all: I_a and I_b or a fake, as in pix2pix."""
    def __init__(self, c, w):
        super().__init__(conv_relu(c, w, 4, 2), conv_relu(w, 2 * w, 4, 2, norm=True),
                         conv_relu(2 * w, 4 * w, 4, 2, norm=True),
                         conv_relu(4 * w, 8 * w, 4, norm=True), conv(8 * w, 1, 4))
    def forward(self, *images):
        return super().forward(pad(torch.cat(images, 1), 32)).float()

class Keypoints(nn.Sequential):
    """CG + SIFT in R's place, holds T: the affine map from keypoints of I_b to those of T(I_a), a field."""
    def forward(self, I_a, I_b):
        O, v = super().forward(I_a), warp.grid_of(I_a.float())
        with torch.autocast(I_a.device.type, enabled=False):  # bfloat16 would round coordinates
            maps = torch.stack([affine_between(*sift(b), *sift(a)) for a, b in zip(O, I_b.float())])
            return torch.einsum("nij,mihw->njhw", maps, nnf.pad(v, (0, 0, 0, 0, 0, 1), value=1.)) - v

def build(o, a, b):
    """{"R", "T", "D"} of the options o for a and b channels, untrained; CG + SIFT: R holds T, S is B to A."""
    R = {"pyramid": Pyramid, "unet": UNet}[o.registration](a, b, o.R_width)
    T = Translator(a, b, o.T_width, o.T_blocks)
    if o.similarity == "cyclegan":
        S, D_b, D_a = Translator(b, a, o.T_width, o.T_blocks), *(Discriminator(c, o.D_width) for c in (b, a))
        return {"R": Keypoints(T), "S": S, "D_b": D_b, "D_a": D_a}
    return {"R": R, "T": T, "D": Discriminator(a + b, o.D_width)}

# ---------------------------------------------------------------- losses
def adversarial(logits, real):
    """A term of eq. (5): binary cross-entropy of logits with "real" or "fake"; R and T ask for "real"."""
    return nnf.softplus(-logits if real else logits).mean()

def local_mean(I, window):
    return nnf.avg_pool2d(I, window, 1, window // 2, count_include_pad=False)
def local_moments(I, J, window):
    """Means, variances and covariance of I and J over window x window neighbourhoods: five maps."""
    i, j, ii, jj, ij = (local_mean(x, window) for x in (I, J, I * I, J * J, I * J))
    return i, j, (ii - i * i).clamp_min(0), (jj - j * j).clamp_min(0), ij - i * j
def correlation(I, J, window):
    """Local correlation of I and J at every pixel, in [-1,1]; 0 where one of them is flat."""
    _, _, var_i, var_j, cov = local_moments(I, J, window)
    return cov / ((var_i + .01) * (var_j + .01)).sqrt()  # the summands: flat images have nothing to correlate
def ssim(I, J, window):
    """Structural similarity at every pixel, images in [-1,1]: constants (.01 L)^2, (.03 L)^2 with L = 2."""
    i, j, var_i, var_j, cov = local_moments(I, J, window)
    return (2 * i * j + .0004) * (2 * cov + .0036) / ((i * i + j * j + .0004) * (var_i + var_j + .0036))
def edges(I):
    """Sobel magnitude of the grey image, smoothed by a 5x5 mean, (B,1,H,W) from -1."""
    sobel = torch.tensor([[1., 0., -1.], [2., 0., -2.], [1., 0., -1.]]).to(I) / 8
    I = nnf.pad(local_mean(I.mean(1, keepdim=True), 5), (1, 1, 1, 1), "replicate")
    return 4 * warp.length(nnf.conv2d(I, torch.stack([sobel, sobel.T])[:, None]))[:, None] - 1

MEASURES = {  # of how little I and J match at each pixel; squared where contrast may be inverted
    "l1": lambda I, J, window: (I - J).abs(),
    "correlation": lambda I, J, window: 1 - correlation(I, J, window),
    "ncc": lambda I, J, window: 1 - correlation(I.mean(1, True), J.mean(1, True), window).square(),
    "ncc-edges": lambda I, J, window: 1 - correlation(edges(I), edges(J), window).square(),
    "ssim-edges": lambda I, J, window: 1 - ssim(edges(I), edges(J), window)}

def distance(measure, I, J, window, scales):
    """Mean over pixels and over scales 1, 1/2, 1/4, ... of a measure: coarse scales see what is far away.
    L_recon of (4) is "l1"; "correlation" does not reward, as L1 does, pulling blank ground over a misfit."""
    total = 0.
    for _ in range(scales):
        total = total + MEASURES[measure](I, J, window).mean()
        I, J = (nnf.avg_pool2d(x, 2, ceil_mode=True) for x in (I, J))
    return total / scales

# ---------------------------------------------------------------- CG + SIFT: keypoints and an affine map
def sift(I):
    """Upright SIFT, one octave, of I (C,H,W): keypoints (N,2), x and y, extrema of a difference of Gaussians,
    and (N,128), the gradients around each: histograms of 8 directions in 4x4 cells of 4x4 pixels."""
    grey = local_mean(I.mean(0, keepdim=True)[None], 3)
    peak = (local_mean(grey, 3) - local_mean(local_mean(grey, 5), 5)).abs()  # means of means: nearly Gaussian
    points = torch.nonzero((peak == nnf.max_pool2d(peak, 5, 1, 2)) & (peak > .01))[:, [3, 2]].float()
    dx, dy = torch.gradient(grey[0, 0], dim=(1, 0))
    turn = torch.atan2(dy, dx) / torch.pi * 4 - torch.arange(8).to(I).view(8, 1, 1)
    votes = torch.hypot(dx, dy) * (1 - (turn + 4).remainder(8).sub(4).abs()).clamp_min(0)  # for two bins
    cells = torch.cartesian_prod(*2 * [torch.tensor([-6., -2., 2., 6.]).to(I)])
    histograms = warp.look_up(local_mean(votes[None], 5), (points[:, None] + cells).movedim(2, 0)[None])[0]
    return points, nnf.normalize(nnf.normalize(histograms.movedim(1, 0).flatten(1)).clamp_max(.2))
def affine_between(p, describe_p, q, describe_q):
    """The affine map (3,2) from one result of `sift` to another. Matches: mutually nearest, and less than .95
    as far as the next. Of 1,000 maps through three of them the one that brings most within 3 pixels is fitted
    to those (RANSAC); the identity where they are fewer than six or than a quarter."""
    distance = nnf.pad(torch.cdist(describe_p, describe_q), (0, 2, 0, 1), value=3.)  # so that there are two
    near, nearest = distance[:-1].topk(2, largest=False)
    mutual = distance.argmin(0)[nearest[:, 0]] == torch.arange(len(p)).to(nearest)
    good = mutual & (near[:, 0] < .95 * near[:, 1])
    P, q = nnf.pad(p, (0, 1), value=1.)[good], q[nearest[good, 0]]
    three = torch.rand(1000, len(q), generator=torch.Generator().manual_seed(0)).to(p).topk(min(3, len(q)))[1]
    agree = (P @ torch.linalg.pinv(P[three]) @ q[three] - q).norm(dim=2) < 3
    agree = agree[agree.sum(1).argmax()]
    fits = agree.sum() >= max(6, len(q) / 4)
    return torch.linalg.pinv(P[agree], rtol=1e-6) @ q[agree] if fits else torch.eye(3, 2).to(p)
