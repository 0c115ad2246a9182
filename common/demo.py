"""What the demo and the tests run on, without a download: vit_tiny, and drawn shapes and scenes."""

import colorsys
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from torch import nn
from torchvision.models import VisionTransformer


class VitTiny(nn.Module):
    """torchvision's VisionTransformer, small enough for a CPU (0.5 M parameters), with DINOv2's interface: patch size
    14, D = 96, 4 blocks, position embedding of a 70-pixel image, interpolated for other sizes."""

    patch_size, embed_dim = 14, 96

    def __init__(self):
        super().__init__()
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.vit = VisionTransformer(70, self.patch_size, 4, 3, self.embed_dim, 4 * self.embed_dim, norm_layer=norm)
        self.vit.heads = nn.Identity()
        torch.backends.mha.set_fastpath_enabled(False)  # other kernels without gradients: rho = 1 needs the same

    def get_intermediate_layers(self, images, n=1, reshape=False, return_class_token=False) -> tuple:
        """The normalised outputs of the last n blocks: patch tokens (B, h*w, D), or (B, D, h, w) with `reshape`, each
        with the class token (B, D) beside it when asked for. images: (B, 3, H, W), sides multiples of the patch size.
        """
        patches = self.vit.conv_proj(images)  # (B, D, h, w)
        h, w = patches.shape[-2:]
        class_token = self.vit.class_token.expand(len(images), -1, -1)
        tokens = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + h*w, D)
        class_position, grid = self.vit.encoder.pos_embedding.split([1, 25], dim=1)  # (1, 1, D), (1, 5*5, D)
        grid = F.interpolate(grid.transpose(1, 2).unflatten(2, (5, 5)), size=(h, w), mode="bicubic")  # (1, D, h, w)
        tokens = tokens + torch.cat([class_position, grid.flatten(2).transpose(1, 2)], dim=1)
        outputs = []
        for block in self.vit.encoder.layers:
            tokens = block(tokens)
            outputs.append(tokens)
        outputs = [self.vit.encoder.ln(tokens) for tokens in outputs[-n:]]
        layers = [tokens[:, 1:] for tokens in outputs]
        if reshape:
            layers = [patch_tokens.transpose(1, 2).unflatten(2, (h, w)) for patch_tokens in layers]
        if return_class_token:
            layers = list(zip(layers, [tokens[:, 0] for tokens in outputs], strict=True))
        return tuple(layers)

    def forward_features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images (B, 3, H, W) -> normalised class token (B, D) and patch tokens (B, h*w, D)."""
        ((patch_tokens, class_token),) = self.get_intermediate_layers(images, return_class_token=True)
        return {"x_norm_clstoken": class_token, "x_norm_patchtokens": patch_tokens}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_features(images)["x_norm_clstoken"]


def corners(radii, start=-90):
    """Corners at the given distances from the origin, at equal angles, from `start` degrees on."""
    angles = np.radians(start + 360 * np.arange(len(radii)) / len(radii))
    return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


DISC = corners([1] * 32)
SHAPES = {  # outline on [-1, 1]^2, and the outline of what is cut out of it
    "circle": (DISC, None),
    "ring": (DISC, [(0.55 * x, 0.55 * y) for x, y in DISC]),
    "crescent": (DISC, [(0.9 * x + 0.5, 0.9 * y) for x, y in DISC]),
    "half_disc": ([(x, y + 0.5) for x, y in DISC if y < 0.01], None),
    "triangle": (corners([1.1] * 3), None),
    "square": ([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)], None),
    "bar": ([(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)], None),
    "star": (corners([1.1, 0.45] * 5), None),
    "plus": (corners([1.05, 0.42, 1.05] * 4, start=-75), None),
    "arrow": ([(-1, -0.25), (0, -0.25), (0, -0.8), (1, 0), (0, 0.8), (0, 0.25), (-1, 0.25)], None),
}


def silhouette(label, size, scales, rng):
    """The shape number `label` in white on black, (size, size), at any place and angle; scales: the least and the
    largest share of the size that it has."""
    scale = size * rng.uniform(*scales)
    centre = size / 2 + rng.uniform(-1, 1, 2) * (size / 2 - scale)
    angle = math.radians(rng.uniform(-30, 30))
    rotation = scale * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    mask = Image.new("L", (size, size))
    pen = ImageDraw.Draw(mask)
    outline, hole = list(SHAPES.values())[label]
    pen.polygon([tuple(point) for point in np.array(outline) @ rotation + centre], fill=255)
    if hole:
        pen.polygon([tuple(point) for point in np.array(hole) @ rotation + centre], fill=0)
    return mask


def draw(silhouettes, rng, side):
    """A picture (side, side, 3) uint8 of bright silhouettes, a list of (image, hue or None), on a darker, shaded
    background, with noise and stray lines in front. The silhouettes have twice the side, for smooth edges."""
    size = 2 * side
    shades = rng.integers(0, 140, (2, 2, 3), dtype=np.uint8)
    picture = Image.fromarray(shades).resize((size, size), Image.Resampling.BILINEAR)
    for mask, hue in silhouettes:
        tint = colorsys.hsv_to_rgb(hue, rng.uniform(0.4, 0.9), rng.uniform(0.7, 1)) if hue is not None else None
        picture.paste(tuple(int(255 * x) for x in tint) if tint else tuple(rng.integers(120, 256, 3)), mask=mask)
    pen = ImageDraw.Draw(picture)
    for _ in range(3):
        pen.line(tuple(rng.uniform(0, size, 4)), fill=tuple(rng.integers(0, 256, 3)), width=2)
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8))


def draw_shape(i, seed, side=42):
    """Sample i of the classification set: a picture (side, side, 3) of one shape of any place, size, angle and colours,
    and its class. A function of i and seed alone; the classes come in turn."""
    rng, label = np.random.default_rng((seed, i)), i % len(SHAPES)
    return draw([(silhouette(label, 2 * side, (0.25, 0.42), rng), None)], rng, side), label


def draw_scene(i, seed, side=112):
    """Sample i of the segmentation set: a picture (side, side, 3) of two to four shapes that may cover each other, and
    its mask (side, side) uint8: 0 background, 1 + the shape's number, 255 (void) on a border of two pixels around every
    shape. A hue belongs to two kinds of shape, so that colour helps but does not decide."""
    rng = np.random.default_rng((seed, i))
    silhouettes, mask = [], np.zeros((side, side), np.uint8)
    for _ in range(rng.integers(2, 5)):
        label = int(rng.integers(len(SHAPES)))
        shape = silhouette(label, 2 * side, (0.14, 0.26), rng)
        silhouettes.append((shape, (label + rng.uniform(-0.8, 0.8)) / len(SHAPES) % 1))
        small = shape.resize((side, side), Image.Resampling.BOX).point(lambda value: 255 * (value > 127))
        mask[np.asarray(small.filter(ImageFilter.MaxFilter(3))) > 0] = 255
        mask[np.asarray(small.filter(ImageFilter.MinFilter(3))) > 0] = 1 + label
    return draw(silhouettes, rng, side), mask
