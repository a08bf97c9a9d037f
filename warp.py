"""Displacement fields: the resampler and the bilateral smoothness, eq. (1)-(3), and tools for fields.

    I     image (n, C, H, W)
    v, u  pixels (x, y): x right, y down; the centre of the top-left pixel is (0, 0)
    phi   displacement field (n, 2, H, W) in pixels; channel 0 is x, channel 1 is y
R_S(I, phi)[v] = I[v + phi(v)]: with phi = (1, 0) everywhere each pixel shows its right neighbour. So what I
holds at p is seen at the v with v + phi(v) = p."""
import torch
import torch.nn.functional as nnf


def pixel_grid(height, width, like):  # the coordinates v of all pixels: (1, 2, H, W), x and y
    x = torch.arange(width, device=like.device, dtype=like.dtype)
    y = torch.arange(height, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))[None]

def sample_at(I, places, padding="zeros"):
    """I, bilinear, at places (n, 2, h, w) in its pixels: (n, C, h, w); padding "zeros" or "border"."""
    height, width = I.shape[2:]
    x, y = places.unbind(1)
    grid = torch.stack([2 * x / max(width - 1, 1), 2 * y / max(height - 1, 1)], dim=-1) - 1
    grid = torch.nan_to_num(grid, nan=2.0)  # outside: NaN makes grid_sample read wild memory on a CPU
    return nnf.grid_sample(I, grid, mode="bilinear", padding_mode=padding, align_corners=True)

def resample(I, phi, padding="zeros"):
    """R_S, eq. (1): I[v + phi(v)], zero outside the image. In float32 at least: bfloat16 would round v."""
    phi = phi.to(torch.promote_types(phi.dtype, torch.float32))
    v = pixel_grid(*phi.shape[2:], like=phi)
    return sample_at(I.to(phi.dtype), v + phi, padding)

def norm(v):  # Euclidean, over channels: (n, H, W); `linalg.vector_norm` is many times slower here
    return (v.square().sum(1) + 1e-12).sqrt()  # the summand keeps the gradient finite at 0

def differences(I):  # between neighbours: along x, along y and both diagonals, each pair of pixels once
    diagonal = I[..., 1:, 1:] - I[..., :-1, :-1]
    return I.diff(dim=3), I.diff(dim=2), diagonal, I[..., 1:, :-1] - I[..., :-1, 1:]

def scaled(phi, x, y):  # its two channels, multiplied by numbers: a tensor of them would travel to the GPU
    return torch.stack([x * phi[:, 0], y * phi[:, 1]], dim=1)

def smoothness(phi, O_s, alpha):
    """L_smooth, eq. (2): mean over v of the sum over its 8 neighbours u of B(u, v) ||phi(u) - phi(v)||.
    B lets phi bend where O_s (n, C, H, W) has an edge. O_s is a constant here: R could otherwise lower this
    loss by putting edges into the image. In half-sides, differences of neighbours shrink like 1/W."""
    height, width = phi.shape[2:]
    phi = scaled(phi, 2 / max(width - 1, 1), 2 / max(height - 1, 1))
    total = 0.0
    for d_phi, d_O in zip(differences(phi), differences(O_s.detach())):
        B = torch.exp(-alpha * norm(d_O))  # eq. (3)
        total += (B * norm(d_phi)).sum()
    mean = 2 * total / (len(phi) * height * width)  # a pair counts for u and for v
    return mean * width / 256  # cancels that 1/W: one lambda_S fits all widths; 256 is the paper's

def bending(phi):  # (n,) mean squared second difference along x and along y
    return sum(phi.diff(2, dim).square().sum((1, 2, 3)) for dim in (2, 3)) / phi[0].numel()

def resize_field(phi, size):  # for an image of another size (H, W); half-pixel centres, as Pillow has them
    height, width = phi.shape[2:]
    return nnf.interpolate(scaled(phi, size[1] / width, size[0] / height), size=size, mode="bilinear")

def random_field(n, size, bend, shift, gen):
    """n fields (n, 2, H, W), in px, cubic through 3x3 knots; std in sides: `bend` of each, `shift` of all."""
    knots = bend * torch.randn(n, 2, 3, 3, generator=gen, device=gen.device)
    whole = shift * torch.randn(n, 2, 1, 1, generator=gen, device=gen.device)
    return scaled(nnf.interpolate(knots + whole, size=size, mode="bicubic", align_corners=True), *size[::-1])

def warp_points(points, phi, iterations=200):
    """Where what I shows at points p (n, N, 2) is seen in R_S(I, phi): the q (n, N, 2) with q + phi(q) = p.
    Half steps: whole ones diverge where phi grows by more than 1 px per px, half ones only beyond 3 px.
    NaN where more than 0.1 px is left: phi folds there, or squeezes I more than fourfold."""
    p = q = points.transpose(1, 2)[..., None].to(phi)  # (n, 2, N, 1)
    for _ in range(iterations):
        left_over = p - q - sample_at(phi, q, "border")
        q = q + 0.5 * left_over
    return torch.where(norm(left_over)[:, None] < 0.1, q, torch.nan)[..., 0].transpose(1, 2)

def jacobian_determinant(phi):  # of v + phi: (n, H-1, W-1), forward differences; at 0 and below phi folds
    x_dx, y_dx = phi.diff(dim=3)[:, :, :-1].unbind(1)
    x_dy, y_dy = phi.diff(dim=2)[..., :-1].unbind(1)
    return (1 + x_dx) * (1 + y_dy) - y_dx * x_dy
