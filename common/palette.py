"""Maps of class indices as pictures."""

import numpy as np
from PIL import Image


def palette():
    """PASCAL VOC's colours of the indices 0 to 255, (256, 3) uint8: the bits of an index, from the lowest on, become
    the highest bits of red, green and blue, then the second highest, then the third."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    for index in range(256):
        for bit in range(8):
            if index >> bit & 1:
                colours[index, bit % 3] += 128 >> bit // 3
    return colours


def palette_image(labels):
    """Class indices (H, W) uint8 as an image of mode P with VOC's palette, as VOC's own masks are."""
    image = Image.fromarray(labels)
    image.putpalette(palette().tobytes())
    return image
