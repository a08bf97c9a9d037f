"""The class-conditional normalizing flow F of DeGIA: an invertible map and a prior, eq. (2), (8).

    x     image (B, C, S, S) in [0, 1], S a multiple of 4; larger ones are averaged down to that size
    u     dequantization noise (B, C, S, S), U[0, 1): y = (255 x + u) / 256 has a density, x has not
    z     latent code (B, D), z = F(x), D = C S^2: the parts that all levels leave behind, side by side
    c, n  class (B,), int64; noise (B, NOISE_DIM), N(0, I), of the random shift of the prior's mean
log p(y | c) = log p_Z(z | c) + log |det dz/dy|: we read p_X(x, c) of eq. (2) as p(x | c). Each layer returns
its output and its log-determinant, in nats: (B,), or one number if all images have the same."""
import math

import torch
import torch.nn as nn

EPS = 0.05  # of the squeezed logit: logit(y) overflows at white pixels, logit(EPS + (1 - 2 EPS) y) does not
SCALE_BOUND = 2.0  # of a coupling's log-scale: it may stretch by e^2 at most
SEEN_BOUND = 5.0  # of what a coupling's network sees, which is of order 1: see AffineCoupling
LOG_STD_MIDDLE, LOG_STD_RADIUS = -0.75, 1.25  # the prior's log-deviation stays within [-2, .5]: see Prior
NOISE_DIM = 16

def bounded(x, bound):  # smoothly within [-bound, bound]: a clamp would have no gradient beyond its bounds
    return bound * torch.tanh(x / bound)

class ActNorm(nn.Module):
    """y = exp(log_scale) (x - shift), per channel: `initialise` gives y mean 0 and deviation 1."""
    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))

    @torch.no_grad()
    def initialise(self, x):
        self.shift.copy_(x.mean((0, 2, 3), keepdim=True))
        self.log_scale.copy_(-torch.log(x.std((0, 2, 3), keepdim=True) + 1e-3))

    def forward(self, x):
        return torch.exp(self.log_scale) * (x - self.shift), x[0, 0].numel() * self.log_scale.sum()

    def inverse(self, y):
        return torch.exp(-self.log_scale) * y + self.shift

class Invertible1x1(nn.Module):
    """y = W x at every pixel: a learned permutation of channels. W starts as a random rotation."""
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels)).Q.contiguous())

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round z itself
            y = torch.einsum("ij,bjhw->bihw", self.weight, x)
        return y, x[0, 0].numel() * torch.linalg.slogdet(self.weight).logabsdet

    def inverse(self, y):
        return torch.einsum("ij,bjhw->bihw", self.weight.inverse(), y)

class AffineCoupling(nn.Module):
    """y_a = x_a,  y_b = exp(s(x_a)) x_b + t(x_a);  log |det| = sum of s. The next 1x1 mixes the halves."""
    def __init__(self, channels, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels // 2, hidden, 3, padding=1), nn.ReLU(),
                                 nn.Conv2d(hidden, hidden, 1), nn.ReLU(),
                                 nn.Conv2d(hidden, channels, 3, padding=1))
        nn.init.zeros_(self.net[-1].weight)  # the coupling starts as the identity
        nn.init.zeros_(self.net[-1].bias)

    def scale_and_shift(self, x_a):
        """s and t. Both are bounded in what they see, s also in its value: one odd pixel would otherwise grow
        from coupling to coupling, to thousands of bits for an image that no training image resembles."""
        s, t = self.net(bounded(x_a, SEEN_BOUND)).to(x_a.dtype).chunk(2, dim=1)
        return bounded(s, SCALE_BOUND), t

    def forward(self, x):
        x_a, x_b = x.chunk(2, dim=1)
        s, t = self.scale_and_shift(x_a)
        return torch.cat([x_a, torch.exp(s) * x_b + t], dim=1), s.sum((1, 2, 3))

    def inverse(self, y):
        y_a, y_b = y.chunk(2, dim=1)
        s, t = self.scale_and_shift(y_a)
        return torch.cat([y_a, torch.exp(-s) * (y_b - t)], dim=1)

class Prior(nn.Module):
    """p_Z = N(mu_c, Sigma_c), eq. (8): mu_c = G_m(c) + lambda H_m(n), Sigma_c = diag(G_std(c)^2). G_m is a
    learned table and absorbs the paper's gamma. The random shift lambda H_m(n) of the mean lets p_Z cover
    more than the images seen. Maximum likelihood would undo it in one of two ways: H_m -> 0, so `shift`
    fixes its size; or a G_std so large that the shift does not matter, so `std` bounds G_std."""
    def __init__(self, dim, classes, lam=0.1):
        super().__init__()
        self.lam = lam
        self.G_m = nn.Embedding(classes, dim)
        self.log_G_std = nn.Embedding(classes, dim)
        self.H_m = nn.Sequential(nn.Linear(NOISE_DIM, 64), nn.Tanh(), nn.Linear(64, dim, bias=False))
        nn.init.normal_(self.G_m.weight, std=0.1)
        nn.init.zeros_(self.log_G_std.weight)
        self.register_buffer("probe", torch.randn(256, NOISE_DIM, generator=torch.Generator().manual_seed(0)))

    def mean(self, c):
        return self.G_m(c)  # (B, D), without the shift

    def std(self, c):  # G_std(c) (B, D): exp of the table log_G_std after bounding it to [-2, .5]
        return torch.exp(LOG_STD_MIDDLE + bounded(self.log_G_std(c) - LOG_STD_MIDDLE, LOG_STD_RADIUS))

    def shift(self, n):
        """lambda H_m(n) (B, D); H_m centred and scaled by its values at 256 fixed n, not at a batch's own."""
        with torch.autocast(n.device.type, enabled=False):
            h, probe = self.H_m(n), self.H_m(self.probe)
        centre = probe.mean(0)
        return self.lam * (h - centre) / (probe - centre).square().mean().add(1e-8).sqrt()

    def log_prob(self, z, c, shift=0.0):  # log N(z; G_m(c) + shift, G_std(c)^2): (B,) nats
        normal = torch.distributions.Normal(self.mean(c) + shift, self.std(c), validate_args=False)
        return normal.log_prob(z).sum(1)  # validation would wait for a GPU

class Flow(nn.Module):
    """F: squeezed logit; at each level squeeze, `steps` x (ActNorm, 1x1, coupling), leave half behind."""
    def __init__(self, channels, size, classes, levels=2, steps=4, lam=0.1, hidden=64):
        super().__init__()
        self.shape = (channels, size, size)
        self.dim = channels * size * size
        self.levels = nn.ModuleList()
        self.latent_shapes = []  # of the part of z that each level leaves behind; the last level leaves all
        for level in range(levels):
            channels, size = 4 * channels, size // 2  # squeeze
            layers = nn.ModuleList()
            for _ in range(steps):
                layers += [ActNorm(channels), Invertible1x1(channels), AffineCoupling(channels, hidden)]
            self.levels.append(layers)
            channels = channels // 2 if level < levels - 1 else channels  # half is left behind
            self.latent_shapes.append((channels, size, size))
        self.prior = Prior(self.dim, classes, lam)

    def forward(self, x, u, initialise=False):  # z (B, D), log |det dz/dy| (B,); `initialise`: sets ActNorms
        x = nn.functional.adaptive_avg_pool2d(x, self.shape[1:])  # an ascent then paints regions, not noise
        squeezed = EPS + (1 - 2 * EPS) * (255 * x + u) / 256  # y, squeezed into [EPS, 1 - EPS]
        h = torch.logit(squeezed)  # dh/dy = (1 - 2 EPS) / (squeezed (1 - squeezed)): its log follows
        log_det = (math.log(1 - 2 * EPS) - torch.log(squeezed) - torch.log1p(-squeezed)).sum((1, 2, 3))
        parts = []
        for layers in self.levels:
            h = nn.functional.pixel_unshuffle(h, 2)  # squeeze: (B, C, H, W) -> (B, 4C, H/2, W/2)
            for layer in layers:
                if initialise and isinstance(layer, ActNorm):
                    layer.initialise(h)
                h, change = layer(h)
                log_det += change
            if layers is not self.levels[-1]:
                h, part = h.chunk(2, dim=1)  # part is the y_b that the last coupling made, h the y_a it saw
                parts.append(part)
        return torch.cat([part.flatten(1) for part in (*parts, h)], 1), log_det

    def inverse(self, z):
        """y = (255 x + u) / 256 (B, C, S, S) of the x and u with F(x, u) = z: forward, mirrored."""
        lengths = [math.prod(shape) for shape in self.latent_shapes]
        *parts, h = [part.unflatten(1, shape) for part, shape in zip(z.split(lengths, 1), self.latent_shapes)]
        with torch.autocast(z.device.type, enabled=False):
            for layers in reversed(self.levels):
                if layers is not self.levels[-1]:
                    h = torch.cat([h, parts.pop()], dim=1)
                for layer in reversed(layers):
                    h = layer.inverse(h)
                h = nn.functional.pixel_shuffle(h, 2)
        return (torch.sigmoid(h) - EPS) / (1 - 2 * EPS)

    def log_prob(self, x, c, u, shift=0.0):  # log p(y | c), eq. (2): (B,) nats of the dequantized image y
        z, log_det = self(x, u)
        return self.prior.log_prob(z, c, shift) + log_det

    def sample(self, c, generator=None):
        """8-bit images (B, C, S, S) of classes c: z ~ N(mu_c, Sigma_c), x = floor(256 y) / 255."""
        n = torch.randn(len(c), NOISE_DIM, generator=generator, device=c.device)
        noise = torch.randn(len(c), self.dim, generator=generator, device=c.device)
        z = self.prior.mean(c) + self.prior.shift(n) + self.prior.std(c) * noise
        return (256 * self.inverse(z)).floor().clamp(0, 255) / 255

def bits_per_dim(log_prob, dim):  # of the 8-bit image, from nats of y: 256 levels are 8 bits, counted once
    return 8 - log_prob / (dim * math.log(2))

def gaussian_w2(mean_1, std_1, mean_2, std_2):  # squared 2-Wasserstein, of diagonal Gaussians, per dimension
    return ((mean_1 - mean_2).square() + (std_1 - std_2).square()).mean()
