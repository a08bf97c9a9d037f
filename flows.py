"""The class-conditional normalizing flow F of DeGIA, eq. (2), (3), (8): an invertible map and a prior.

    x, y         image (B,C,S,S) in [0,1], S a multiple of 4; dequantised: y = (255 x + u)/256, u ~ U[0,1)
    z            latent code (B,D), z = F(x), D = C S^2: the factored-out parts of all scales side by side
    c            class (B,) int64: mu_c = gamma G_m(c) + lambda H_m(n),  Sigma_c = G_std(c)             (8)
    G_m, G_std   learned mean and standard deviation of each class;  H_m  noise shift, an MLP of n ~ N(0, I)
Each layer returns (output, log |det d output / d input|), the latter (B,) or one number. Log-likelihoods are
of y, in nats. Only the couplings' networks may run in bfloat16, which would round z itself elsewhere.
"""
import math
import torch
import torch.nn as nn

SQUEEZED_LOGIT = .05  # eps of logit(eps + (1 - 2 eps) y): a bare logit overflows at white pixels
SCALE_BOUND, SEEN_BOUND = 2., 5.  # of a coupling's log-scale; of what its net sees, else odd values run away
NOISE_DIM = 16  # dimension of n in H_m(n)

class ActNorm(nn.Module):
    """y = exp(log_scale) (x - shift) per channel, set by `Flow.initialise` to mean 0 and deviation 1."""
    def __init__(self, channels):
        super().__init__()
        self.shift, self.log_scale = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))
        self.register_buffer("is_set", torch.tensor(False))  # in checkpoints, else it would be set anew
    def initialise(self, x):
        self.shift.copy_(x.mean((0, 2, 3), keepdim=True))
        self.log_scale.copy_(-torch.log(x.std((0, 2, 3), keepdim=True) + 1e-3))
        self.is_set.fill_(True)
    def forward(self, x):
        return (x - self.shift) * self.log_scale.exp(), self.log_scale.sum() * x[0, 0].numel()
    def inverse(self, y):
        return y * (-self.log_scale).exp() + self.shift

class Invertible1x1(nn.Module):
    """y = W x at every pixel; log |det| = H W log |det W|. W starts as a random rotation."""
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0].contiguous())
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return torch.einsum("ij,bjhw->bihw", self.weight, x), self.weight.slogdet()[1] * x[0, 0].numel()
    def inverse(self, y):
        return torch.einsum("ij,bjhw->bihw", self.weight.inverse(), y)

class AffineCoupling(nn.Module):
    """y_a = x_a;  y_b = exp(s(x_a)) x_b + t(x_a), |s| < SCALE_BOUND;  log |det| = sum s."""
    def __init__(self, channels, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels // 2, hidden, 3, padding=1), nn.ReLU(),
                                 nn.Conv2d(hidden, hidden, 1), nn.ReLU(),
                                 nn.Conv2d(hidden, channels, 3, padding=1))
        for p in self.net[-1].parameters():  # so that the coupling starts as the identity
            nn.init.zeros_(p)
    def split(self, x):
        x_a, x_b = x.chunk(2, 1)  # s and t are for x_b, but depend on x_a alone
        s, t = self.net(SEEN_BOUND * torch.tanh(x_a / SEEN_BOUND)).to(x_a.dtype).chunk(2, 1)
        return x_a, x_b, SCALE_BOUND * torch.tanh(s / SCALE_BOUND), t
    def forward(self, x):
        x_a, x_b, s, t = self.split(x)
        return torch.cat([x_a, x_b * s.exp() + t], 1), s.sum((1, 2, 3))
    def inverse(self, y):
        y_a, y_b, s, t = self.split(y)
        return torch.cat([y_a, (y_b - t) * (-s).exp()], 1)

class Prior(nn.Module):
    """p_Z = N(mu_c, Sigma_c), eq. (8): `mean` gamma G_m(c), `std` G_std(c), `shift` lambda H_m(n), (B,D)."""
    def __init__(self, dim, classes, gamma=1., lam=.1):
        super().__init__()
        self.gamma, self.lam = gamma, lam
        self.G_m, self.log_G_std = nn.Embedding(classes, dim), nn.Embedding(classes, dim)
        self.H_m = nn.Sequential(nn.Linear(NOISE_DIM, 64), nn.Tanh(), nn.Linear(64, dim, bias=False))
        nn.init.normal_(self.G_m.weight, std=.1)
        nn.init.zeros_(self.log_G_std.weight)
    def mean(self, c):
        return self.gamma * self.G_m(c)
    def std(self, c):
        return self.log_G_std(c).clamp(-2, .5).exp()  # else F could scale the noise of eq. (8) away
    def shift(self, n):
        """lambda H_m(n) of noise n (B,NOISE_DIM), with mean 0 and root mean square lambda over the batch:
        maximum likelihood would otherwise shrink the shift to nothing, or turn it into a constant."""
        h = self.H_m(n).to(n.dtype)
        h = h - h.mean(0)
        return self.lam * h / h.square().mean().add(1e-8).sqrt()
    def log_prob(self, z, c, shift=0.):
        """log N(z; gamma G_m(c) + shift, G_std(c)^2), summed over dimensions: (B,) nats."""
        std = self.std(c)
        return (-((z - self.mean(c) - shift) / std).square() / 2 - std.log() - .5 * math.log(math.tau)).sum(1)

class Flow(nn.Module):
    """F: a squeezed logit, then levels of squeeze, `steps` x (ActNorm, 1x1, coupling), half factored out."""
    def __init__(self, channels, size, classes, levels=2, steps=4, gamma=1., lam=.1, hidden=64):
        super().__init__()
        self.shape, self.dim = (channels, size, size), channels * size * size
        widths = [channels * 2 ** (2 + level) for level in range(levels)]  # a squeeze makes 4 C; half go on
        self.levels = nn.ModuleList(nn.ModuleList(layer for _ in range(steps) for layer in (
            ActNorm(width), Invertible1x1(width), AffineCoupling(width, hidden))) for width in widths)
        self.prior = Prior(self.dim, classes, gamma, lam)
    def forward(self, x, u, initialise=False):
        """z = F(x) (B,D) and log |det dz/dy| (B,) of images x (B,C,S,S) in [0,1], with u (B,C,S,S)."""
        y = SQUEEZED_LOGIT + (1 - 2 * SQUEEZED_LOGIT) * ((255 * x + u) / 256)
        h, z = torch.logit(y), []
        log_det = (math.log(1 - 2 * SQUEEZED_LOGIT) - torch.log(y) - torch.log1p(-y)).sum((1, 2, 3))
        for level in self.levels:
            h = torch.pixel_unshuffle(h, 2)  # squeeze: (B,C,H,W) -> (B,4C,H/2,W/2)
            for layer in level:
                if initialise and isinstance(layer, ActNorm) and not layer.is_set:
                    layer.initialise(h)
                h, change = layer(h)
                log_det = log_det + change
            if level is not self.levels[-1]:
                h, out = h.chunk(2, 1)  # the last coupling normalised `out` given h
                z.append(out.flatten(1))
        return torch.cat([*z, h.flatten(1)], 1), log_det
    @torch.no_grad()
    def initialise(self, x, u):
        """Let every ActNorm that has not been set yet set itself from the batch x."""
        self(x, u, initialise=True)
    def inverse(self, z):
        """y = (255 x + u)/256 (B,C,S,S) for the x, u with F(x, u) = z, in float32."""
        n, side = self.dim * 2 // 2 ** len(self.levels), self.shape[1] // 2 ** len(self.levels)
        h = z[:, -n:].unflatten(1, (-1, side, side))  # what the last level left
        with torch.autocast(z.device.type, enabled=False):
            for level in reversed(self.levels):
                if level is not self.levels[-1]:
                    h, n = torch.cat([h, z[:, -2 * n:-n].view_as(h)], 1), 2 * n
                for layer in reversed(level):
                    h = layer.inverse(h)
                h = torch.pixel_shuffle(h, 2)
        return (torch.sigmoid(h) - SQUEEZED_LOGIT) / (1 - 2 * SQUEEZED_LOGIT)
    def log_prob(self, x, c, u, shift=0.):
        """log p(y | c) = log p_Z(z, c) + log |det dz/dy|, eq. (2): (B,) nats of the dequantised image y."""
        z, log_det = self(x, u)
        return self.prior.log_prob(z, c, shift) + log_det
    @torch.no_grad()
    def sample(self, c, generator):
        """Images (B,C,S,S) in {0, 1/255, ..., 1}: z ~ N(mu_c, Sigma_c), x = floor(256 F^-1(z))/255."""
        n, eps = (torch.randn(len(c), d, generator=generator, device=c.device) for d in (NOISE_DIM, self.dim))
        z = self.prior.mean(c) + self.prior.shift(n) + self.prior.std(c) * eps
        return (self.inverse(z) * 256).floor().clamp(0, 255) / 255

def bits_per_dim(log_prob, dim):
    """Bits per dimension of the 8-bit image from nats of the dequantised one: the 256 levels counted once."""
    return 8 - log_prob / (dim * math.log(2))
def gaussian_w2(mean_1, std_1, mean_2, std_2):
    """Squared 2-Wasserstein distance of diagonal Gaussians per dimension: mean (m1 - m2)^2 + (s1 - s2)^2."""
    return ((mean_1 - mean_2).square() + (std_1 - std_2).square()).mean()
