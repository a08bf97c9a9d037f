"""DeGIA: the task network M in five backbones, the task losses, the objective of the max phase, its ascent.

    x, y, c   image (B, 3, H, W) in [0, 1], its target, its class (digits: c = y, hands: the nearest pose)
    x_src     the training image that x grew from
    M         task network; M(x) in eq. (7) is its *template feature*, the input of its last layer
    F         class-conditional flow of the training set; it averages x down, to D numbers
    P_src     the prior of the class, N(G_m(c), G_std(c)^2);  P_x the Gaussian of z = F(x) over images x
    min phase, eq. (5):  l = l_task(M(x), y) - log p_X(x, c)
    max phase, eq. (7):  x <- argmax_x { l - alpha [ d(P_x, P_src) + ||M(x) - M(x_src)||^2 ] }
What balances what: l_task is of order 1 (hands: .01); -log p, of order D, is divided by D; d and the feature
distance are means per dimension. With G_std = 1 and z of mean m, -log p_Z / D grows like (m - mu)^2 / 2, but
alpha d like alpha (m - mu)^2, mu the prior's mean: alpha < 1/2 lets m run away, alpha > 1/2 holds it back."""
import torch
import torch.nn as nn
import torch.nn.functional as nnf

from flows import Flow, gaussian_w2


# ---------------------------------------------------------------- backbones; w is their width
def conv(c_in, c_out, kernel=3, stride=1):  # the size stays, or is divided by the stride
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2), nn.ReLU())

def conv_norm(c_in, c_out, kernel=3, stride=1):  # BatchNorm's statistics would not fit an unseen domain
    layer = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(1, c_out))

def full_layers(channels, side, width):  # the two at the end of the older networks
    return nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(channels * side ** 2, width),
                         nn.ReLU(), nn.Linear(width, width), nn.ReLU())

def lenet(w):  # w = 64 at 32x32 is the digit network of ADA, M-ADA and RandConv
    return nn.Sequential(nn.Conv2d(3, w, 5), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(w, 2 * w, 5), nn.ReLU(), nn.MaxPool2d(2), full_layers(2 * w, 5, 16 * w))

def alexnet(w):  # a large first kernel with a stride, overlapping pools
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(conv(3, w, 11, stride=2), pool, conv(w, 3 * w, 5), pool,
                         conv(3 * w, 6 * w), conv(6 * w, 4 * w), conv(4 * w, 4 * w), pool,
                         full_layers(4 * w, 4, 16 * w))

def vgg(w):  # stacks of 3x3 convolutions: VGG-11 without its last stack
    pool = nn.MaxPool2d(2)
    return nn.Sequential(conv(3, w), pool, conv(w, 2 * w), pool,
                         conv(2 * w, 4 * w), conv(4 * w, 4 * w), pool,
                         conv(4 * w, 8 * w), conv(8 * w, 8 * w), pool, full_layers(8 * w, 4, 16 * w))

class Residual(nn.Module):  # the basic block of ResNet: relu(f(x) + skip(x))
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.f = nn.Sequential(conv_norm(c_in, c_out, 3, stride), nn.ReLU(), conv_norm(c_out, c_out))
        self.skip = nn.Identity() if stride == 1 else conv_norm(c_in, c_out, 1, stride)

    def forward(self, x):
        return torch.relu(self.f(x) + self.skip(x))

def resnet(w):  # four stages of two basic blocks: those of ResNet-18
    layers = [conv_norm(3, w, stride=2), nn.ReLU()]
    for c_in, c_out in ((w, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w)):
        layers += [Residual(c_in, c_out, c_out // c_in), Residual(c_out, c_out, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())

class DenseLayer(nn.Module):  # of DenseNet: x, and w new channels f(x), side by side
    def __init__(self, c_in, w):
        super().__init__()
        self.f = nn.Sequential(conv_norm(c_in, 4 * w, 1), nn.ReLU(), conv_norm(4 * w, w), nn.ReLU())

    def forward(self, x):
        return torch.cat([x, self.f(x)], 1)

def densenet(w):  # three blocks of four layers; a transition after each halves channels and size
    layers = [conv_norm(3, 4 * w, stride=2), nn.ReLU()]
    for _ in range(3):
        layers += [DenseLayer(channels, w) for channels in (4 * w, 5 * w, 6 * w, 7 * w)]
        layers += [conv_norm(8 * w, 4 * w, 1), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())

BACKBONES = {"lenet": lenet, "alexnet": alexnet, "vgg": vgg, "resnet": resnet, "densenet": densenet}

class TaskNetwork(nn.Module):  # M: a backbone, whose output is the template feature, and a last full layer
    def __init__(self, backbone, width, size, outputs):
        super().__init__()
        self.backbone = BACKBONES[backbone](width)
        self.head = nn.Linear(self.backbone(torch.zeros(1, 3, size, size)).shape[1], outputs)
        self.register_buffer("mean_pose", torch.zeros(outputs))  # of the training landmarks; 0 for digits
        self.register_buffer("poses", torch.zeros(8, outputs))  # the classes of hands: clusters of landmarks

    def forward(self, x):
        feature = self.backbone(x)
        return self.mean_pose + self.head(feature), feature

def build(o, y=None):  # M; F (side at most --size) or None; untrained. Hands' poses: of y, or a checkpoint's
    M = TaskNetwork(o.backbone, o.M_width, o.size, outputs=34 if o.task == "hands" else 10)
    if o.task == "hands" and y is not None:
        M.mean_pose.copy_(y.mean(0))
        M.poses.copy_(k_means(y, len(M.poses)))
    classes = len(M.poses) if o.task == "hands" else 10
    return M, Flow(3, min(o.flow_size, o.size // 4 * 4), classes, lam=o.lam) if o.method == "degia" else None

# ---------------------------------------------------------------- task losses, and the max phase
def task_loss(output, y):
    """l_task (B,): squared error of landmarks y (B, 34), eq. (1), per coordinate; cross-entropy of digits."""
    if y.is_floating_point():
        return (output.float() - y).square().mean(1)
    return nnf.cross_entropy(output.float(), y, reduction="none")

def max_objective(x, y, c, M, F, feature_src, u, shift, alpha):
    """Eq. (7) summed over images x, ALL of one class c (B,): d is between their P_x and the P_src of that
    class, whose mean has no shift. feature_src (B, features) is M(x_src). Draw u and shift, as in
    Flow.log_prob, once per ascent: new ones in each step would change the objective under it."""
    output, feature = M(x)
    l_task = task_loss(output, y)
    feature_distance = (feature.float() - feature_src).square().mean(1)  # no pull in the first step, at x_src
    if F is None:
        return (l_task - alpha * feature_distance).sum()  # adversarial data augmentation (ADA)
    z, log_det = F(x, u)
    log_p = F.prior.log_prob(z, c, shift) + log_det
    std = z.var(0, correction=0).add(1e-8).sqrt()  # 1e-8: a single image would get NaN
    d = gaussian_w2(z.mean(0), std, F.prior.mean(c[0]), F.prior.std(c[0]))  # one number, of all x together
    return (l_task - alpha * feature_distance - log_p / F.dim - alpha * d).sum()  # d counts for each x

def ascend(x_src, objective, K, eta, blur):
    """K steps x <- clamp(x + eta g / rms(g)) from x_src; g: the gradient, averaged over blur x blur windows.
    So eta, a number or (B, 1, 1, 1), is x's rms change before the clamp; a raw g changes nothing, or all."""
    x = x_src.detach()
    for _ in range(K):
        x.requires_grad_()
        g, = torch.autograd.grad(objective(x), x)  # of x alone: no parameter keeps one for the min step
        g = nnf.avg_pool2d(g, blur, stride=1, padding=blur // 2, count_include_pad=False)
        rms = g.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-20)
        x = (x.detach() + eta * g / rms).clamp(0, 1)
    return x

def classes_of(y, M):  # the class c of each target: a digit itself, the nearest of the poses
    return torch.cdist(y, M.poses.to(y)).argmin(1) if y.is_floating_point() else y

def k_means(y, k):  # k centres of poses y (N, 34); at first, each is the pose farthest from those before it
    centres = y[:1].clone()
    for _ in range(k - 1):
        centres = torch.cat([centres, y[torch.cdist(y, centres).amin(1).argmax(), None]])
    for _ in range(20):
        nearest = torch.cdist(y, centres).argmin(1)
        for i in nearest.unique():
            centres[i] = y[nearest == i].mean(0)
    return centres
