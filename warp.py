"""Displacement fields: resampling, smoothness, composition, inversion, points, folding; eq. (1)-(3).

    I      image (B,C,H,W);  v, u  pixels (x, y), x right, y down, the centre of the top-left pixel is (0, 0)
    phi    displacement field (B,2,H,W) in PIXELS, channel 0 = x, channel 1 = y
    R_S    resampler: R_S(I, phi)[v] = I[v + phi(v)]; content of I at p is seen at the v with v + phi(v) = p
"""
import torch
import torch.nn.functional as nnf

def grid_of(phi):
    """The coordinates v of all pixels (1,2,H,W), as x and y."""
    return torch.stack(torch.meshgrid(*map(torch.arange, phi.shape[:1:-1]), indexing="xy"))[None].to(phi)
def look_up(I, places, padding="zeros"):
    """I at places (B,2,h,w), pixels of I as x and y; bilinear; padding: "zeros" or "border"."""
    last = torch.tensor([max(side - 1, 1) for side in I.shape[:1:-1]]).to(places)  # W-1, H-1
    return nnf.grid_sample(I, 2 * places.movedim(1, -1) / last - 1, "bilinear", padding, align_corners=True)
def resample(I, phi, padding="zeros"):
    """R_S, eq. (1): R_S(I, phi)[v] = I[v + phi(v)], bilinear, zero outside; never in less than float32."""
    phi = phi.to(torch.promote_types(phi.dtype, torch.float32))
    return look_up(I.to(phi), grid_of(phi) + phi, padding)

def resize_field(phi, size):
    """phi on a grid of `size` (H,W), with half-pixel centres; its values scale with the sides."""
    scale = torch.tensor([size[1] / phi.shape[-1], size[0] / phi.shape[-2]]).to(phi).view(1, 2, 1, 1)
    return nnf.interpolate(phi, size=tuple(size), mode="bilinear", align_corners=False) * scale
def random_field(n, size, bend, shift, gen):
    """n smooth fields (n,2,H,W): deviation `bend` at 3x3 points, `shift` of the whole, in shares of H, W."""
    coarse = torch.randn(n, 2, 10, generator=gen, device=gen.device)
    coarse = bend * coarse[:, :, :9].view(n, 2, 3, 3) + shift * coarse[:, :, 9:, None]
    sides = torch.tensor(size[::-1], device=gen.device).view(1, 2, 1, 1)
    return sides * nnf.interpolate(coarse, size=tuple(size), mode="bicubic", align_corners=True)

def compose(first, then):
    """The field that does both: R_S(R_S(I, first), then) = R_S(I, compose(first, then))."""
    return then + resample(first, then, "border")
def warp_points(points, phi, iterations=50):
    """Where the content of I at `points` (B,N,2) is seen in R_S(I, phi): q with q + phi(q) = p, iterated."""
    q = p = points.transpose(1, 2)[..., None].to(phi)  # (B,2,N,1)
    for _ in range(iterations):
        q = p - look_up(phi, q, "border")
    return q[..., 0].transpose(1, 2)
def invert(phi):
    """psi with compose(phi, psi) = 0: v + psi(v) is where the content of v is seen; for slopes below 1."""
    v = grid_of(phi).flatten(2).transpose(1, 2)
    return (warp_points(v.expand(len(phi), -1, -1), phi) - v).transpose(1, 2).view_as(phi)
def jacobian_determinant(phi):
    """det of d(v + phi)/dv (B,H-1,W-1) by forward differences; below 0 the field folds."""
    right, down = phi.diff(dim=3)[:, :, :-1], phi.diff(dim=2)[..., :-1]
    return (1 + right[:, 0]) * (1 + down[:, 1]) - right[:, 1] * down[:, 0]

def length(v):
    """Euclidean norm over channels (B,H,W), on a CPU up to 18 times faster than `linalg.vector_norm`."""
    return (v.square().sum(1) + 1e-12).sqrt()  # the summand keeps the gradient finite at 0
def smoothness(phi, O_s, alpha):
    """Eq. (2): mean over v of the sum over its 8 neighbours u of B(u, v) ||phi(u) - phi(v)||, times W/256.
    Eq. (3): B = exp(-alpha ||O_s[u] - O_s[v]||): the field may bend at the edges of O_s (B,C,H,W)."""
    height, width = phi.shape[-2:]  # phi in half-sizes of the image: a weight is one stiffness at every size
    phi = phi / torch.tensor([max(width - 1, 1) / 2, max(height - 1, 1) / 2]).to(phi).view(1, 2, 1, 1)
    def differences(I):  # I[u] - I[v] of each two neighbours once: side by side, above each other, diagonal
        return (I[..., 1:] - I[..., :-1], I[..., 1:, :] - I[..., :-1, :],
                I[..., 1:, 1:] - I[..., :-1, :-1], I[..., 1:, :-1] - I[..., :-1, 1:])
    pairs = zip(differences(phi), differences(O_s.detach()))
    total = sum((torch.exp(-alpha * length(edge)) * length(bend)).sum() for bend, edge in pairs)
    return 2 * total / (len(phi) * height * width) * width / 256  # a pair counts for u and for v

def colour_wheel(phi, longest):
    """phi as colours (B,3,H,W) in [0,1]: hue is the direction, saturation the length, white is 0."""
    x, y = phi.unbind(1)
    hue, strength = torch.atan2(y, x) / (2 * torch.pi), (torch.hypot(x, y) / max(longest, 1e-6)).clamp(0, 1)
    ramps = torch.stack([(hue - shift) % 1 for shift in (0, 1 / 3, 2 / 3)], 1)  # distance round the wheel
    return 1 - strength[:, None] * (1 - (2 - 6 * torch.minimum(ramps, 1 - ramps)).clamp(0, 1))
