"""Two-flow multi-modal registration: the networks and losses of the paper, and the classical measures.

    I_a, I_b  images of modality A and B (B,C,H,W) in [-1,1], of any size, with any number of channels
    R         registration network: phi = R(I_a, I_b), a displacement field (B,2,H,W) in pixels
    T         translation network: makes A look like B; trained so that it must keep geometry
    D         conditional patch discriminator: is this the B that belongs to I_a?
    O_RT = R_S(T(I_a), phi)  translate first          O_TR = T(R_S(I_a, phi))  register first

Both orders share one phi. If T moved anything, not both could match I_b: what moving pixels can explain is
left to R. The loop itself is `train.train_reg`.
"""
import torch
import torch.nn as nn
import torch.nn.functional as nnf

import warp

EDGE_BLUR = 5    # side of the mean before Sobel's filter
FLAT = 1e-2      # added to local variances: where both images are flat there is nothing to correlate

# ---------------------------------------------------------------- networks

def conv(c_in, c_out, kernel=3, stride=1, bias=True):
    """A convolution that keeps the size (over the stride), Kaiming-initialised."""
    layer = nn.Conv2d(c_in, c_out, kernel, stride, (kernel - 1) // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, a=.2)
    return layer

def conv_relu(*arguments):
    return nn.Sequential(conv(*arguments), nn.LeakyReLU(.2))

def conv_norm(c_in, c_out, kernel=3, stride=1):
    """Without a bias, which InstanceNorm would take away again."""
    return nn.Sequential(conv(c_in, c_out, kernel, stride, bias=False), nn.InstanceNorm2d(c_out))

class Residual(nn.Module):
    """x + f(x), f two convolutions with InstanceNorm."""
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(conv_norm(width, width), nn.LeakyReLU(.2), conv_norm(width, width))
    def forward(self, x):
        return x + self.body(x)

def field_layer(width):
    """The last layer of R: small weights, so that phi starts near 0."""
    layer = nn.Conv2d(width, 2, 3, padding=1)
    nn.init.normal_(layer.weight, std=.01)
    nn.init.zeros_(layer.bias)
    return layer

def pad(I, multiple):
    """I with its last row and column repeated until the sides are multiples; the networks crop again."""
    return nnf.pad(I, (0, -I.shape[3] % multiple, 0, -I.shape[2] % multiple), "replicate")

class Pyramid(nn.Module):
    """R from coarse to fine: warp A's features by phi, compare them with B's, correct phi; twice a level.
    Levels are 1/2, 1/4, ... of the image; the finest that corrects phi is 1/4, which keeps phi smooth."""
    def __init__(self, a, b, width, levels):
        super().__init__()
        self.encode_a, self.encode_b = (nn.ModuleList(
            nn.Sequential(conv_relu(c if level == 0 else width, width, 3, 2), conv_relu(width, width))
            for level in range(levels)) for c in (a, b))
        self.correct = nn.ModuleList(nn.Sequential(
            conv_relu(2 * width + 2, 2 * width), conv_relu(2 * width, width), field_layer(width))
            for _ in range(max(1, levels - 1)))
    def forward(self, I_a, I_b):
        features = [tuple(pad(I, 2 ** len(self.encode_a)) for I in (I_a, I_b))]
        for encode_a, encode_b in zip(self.encode_a, self.encode_b):
            a, b = features[-1]
            features.append((encode_a(a), encode_b(b)))
        phi = I_a.new_zeros(len(I_a), 2, *features[-1][0].shape[-2:], dtype=torch.float32)
        for correct, (a, b) in zip(self.correct, reversed(features)):
            phi = warp.resize_field(phi, a.shape[-2:])
            for _ in range(2):
                phi = phi + correct(torch.cat([warp.resample(a, phi, "border"), b, phi], 1)).float()
        return warp.resize_field(phi, features[0][0].shape[-2:])[..., :I_a.shape[2], :I_a.shape[3]]

class Translator(nn.Module):
    """T: `downs` halvings, residual blocks, as many doublings, tanh."""
    def __init__(self, a, b, width, downs, blocks):
        super().__init__()
        kernel, self.multiple = 7 if downs else 3, 2 ** (downs + 1)
        steps = [(width * 2 ** i, width * 2 ** (i + 1)) for i in range(downs)]
        layers = [conv_relu(a, width, kernel)]
        for i, o in steps:
            layers += [conv_norm(i, o, 3, 2), nn.LeakyReLU(.2)]
        layers += [Residual(width * 2 ** downs) for _ in range(blocks)]
        for i, o in reversed(steps):
            layers += [nn.Upsample(scale_factor=2, mode="bilinear"), conv_norm(o, i), nn.LeakyReLU(.2)]
        self.net = nn.Sequential(*layers, conv(width, b, kernel))
    def forward(self, I_a):
        return torch.tanh(self.net(pad(I_a, self.multiple))[..., :I_a.shape[2], :I_a.shape[3]].float())

class Discriminator(nn.Module):
    """D: a logit for each patch of a pair (I_a, I_b or a fake), as in pix2pix."""
    def __init__(self, a, b, width, layers):
        super().__init__()
        widths = [width * min(2 ** i, 8) for i in range(layers + 1)]
        self.net = nn.Sequential(conv_relu(a + b, width, 4, 2))
        for level, (i, o) in enumerate(zip(widths, widths[1:]), 1):
            self.net.extend([conv_norm(i, o, 4, 2 if level < layers else 1), nn.LeakyReLU(.2)])
        self.net.append(conv(widths[-1], 1, 4))
    def forward(self, I_a, I):
        return self.net(pad(torch.cat([I_a, I], 1), 2 ** 4))[..., :I.shape[2], :I.shape[3]].float()

def build(o, channels):
    """R, T and D of the options o for A and B of so many channels, untrained."""
    a, b = channels
    R = Pyramid(a, b, o.R_width, o.R_levels)
    return R, Translator(a, b, o.T_width, o.T_downs, o.T_blocks), Discriminator(a, b, o.D_width, o.D_layers)

# ---------------------------------------------------------------- losses

def adversarial(logits, real):
    """A term of eq. (5): binary cross-entropy of logits with "real" or "fake"; R and T ask for "real"."""
    return nnf.softplus(-logits if real else logits).mean()

def local_moments(I, J, window):
    """Means, variances and covariance of I and J over window x window neighbourhoods: five maps."""
    def mean(x):
        return nnf.avg_pool2d(x, window, 1, window // 2, count_include_pad=False)
    i, j = mean(I), mean(J)
    return i, j, (mean(I * I) - i * i).clamp_min(0), (mean(J * J) - j * j).clamp_min(0), mean(I * J) - i * j

def correlation(I, J, window):
    """Local correlation of I and J at every pixel, in [-1,1]; 0 where one of them is flat."""
    _, _, var_i, var_j, cov = local_moments(I, J, window)
    return cov / ((var_i + FLAT) * (var_j + FLAT)).sqrt()

def edges(I):
    """Sobel magnitude of the smoothed grey image (B,1,H,W)."""
    I = nnf.avg_pool2d(I.mean(1, keepdim=True), EDGE_BLUR, 1, EDGE_BLUR // 2, count_include_pad=False)
    sobel = torch.tensor([[1., 0., -1.], [2., 0., -2.], [1., 0., -1.]]).to(I) / 8
    slopes = nnf.conv2d(nnf.pad(I, (1, 1, 1, 1), "replicate"), torch.stack([sobel, sobel.T])[:, None])
    return torch.linalg.vector_norm(slopes, dim=1, keepdim=True)

def over_scales(compare, I, J, scales):
    """Mean over scales 1, 1/2, 1/4, ... of compare(I, J): coarse ones see what is far away."""
    total = compare(I, J)
    for _ in range(scales - 1):
        I, J = nnf.avg_pool2d(I, 2), nnf.avg_pool2d(J, 2)
        total = total + compare(I, J)
    return total / scales

def distance(O, I_b, window, scales):
    """L_recon of eq. (4) for one order: mean over pixels of ||O - I_b||_1, or of 1 - local correlation, which
    unlike L1 does not reward a field that pulls blank ground over whatever does not fit yet."""
    def compare(O, I_b):
        return 1 - correlation(O, I_b, window).mean() if window else (O - I_b).abs().mean()
    return over_scales(compare, O, I_b, scales)

def dissimilarity(measure, moved, I_b, window, scales):
    """1 - squared local correlation of the registered A and I_b, of their grey values or of their edges."""
    I, J = (4 * edges(I) - 1 if measure == "ncc-edges" else I.mean(1, keepdim=True) for I in (moved, I_b))
    return over_scales(lambda I, J: 1 - correlation(I, J, window or 9).square().mean(), I, J, scales)
