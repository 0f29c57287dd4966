"""Eight looks out of nothing but noise, gradients and shapes: each painter draws one, different for every generator.

A painter takes a random generator and a size and returns colours (H, W, 3), roughly 0…1. Lengths are in heights of the
picture, so that any size shows the same scene. `jobs.pictures` turns them into photos.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Field = npt.NDArray[np.floating[Any]]  # float32 but in passing: (H, W) or (H, W, 3), 0…1 from dark to light
Painter = Callable[[np.random.Generator, int, int], Field]


def _sunset(rng: np.random.Generator, height: int, width: int) -> Field:
    y, x = grid(height, width)
    horizon, sun_x = rng.uniform(0.5, 0.66), rng.uniform(0.2, 0.8) * x.max()
    sun_y, radius = horizon - rng.uniform(0.0, 0.2), rng.uniform(0.05, 0.09)
    top = [(0.13, 0.13, 0.36), (0.27, 0.16, 0.42), (0.08, 0.24, 0.44)][rng.integers(3)]
    middle, low = (0.88, rng.uniform(0.3, 0.46), 0.34), (1.0, rng.uniform(0.64, 0.78), 0.36)
    distance = np.hypot(x - sun_x, y - sun_y)
    field = _ramp(y / horizon, top, middle, low) + _light(np.exp(-5 * distance), (0.45, 0.3, 0.1))
    clouds = np.clip(_noise(rng, height, width, 7, 2) * 3 - rng.uniform(1.3, 1.8), 0, 0.75)
    _cover(field, clouds, _ramp(np.exp(-2.5 * distance), (0.36, 0.2, 0.38), (1.0, 0.62, 0.4)))
    _cover(field, (radius - distance) / 0.008, (1.0, 0.95, 0.74))
    depth = np.clip((y - horizon) / (1 - horizon), 0, 1)
    far = (np.log1p(20 * depth[:, 0]) / np.log(21) * (height - 1)).astype(int)  # waves shrink towards the horizon
    waves = _noise(rng, height, width, 40, 4)[far]
    tones = np.multiply(low, 0.8), np.multiply(middle, 0.5), np.multiply(top, 0.6)
    sea = _ramp(depth, *tones) * (0.7 + 0.6 * waves)[..., None]
    glitter = np.exp(-(((x - sun_x) / (0.05 + 0.2 * depth)) ** 2)) * np.clip(waves * 5 - 2.2, 0, 1)
    sea += _light(glitter, (1.0, 0.72, 0.4))
    _cover(field, (y - horizon) * height, sea)
    return field


def _forest(rng: np.random.Generator, height: int, width: int) -> Field:
    y, x = grid(height, width)
    light_x, green = rng.uniform(0.3, 0.7) * x.max(), rng.uniform(0.0, 0.12)
    glow = np.exp(-2.2 * np.hypot(x - light_x, (y - 0.42) * 1.3))
    field = _ramp(glow, (0.10 + green, 0.24, 0.10), (0.45 + green, 0.62, 0.26), (0.96, 0.97, 0.72))
    ground = rng.uniform(0.66, 0.76)
    for layer in range(3):  # far to near: wider, darker, fewer
        near = layer / 2
        leaves = _noise(rng, height, width, 14 - 3 * layer, 18 - 4 * layer)
        for _ in range(rng.integers(8, 12) - 2 * layer):
            middle, girth = rng.uniform(0, x.max()), rng.uniform(0.009, 0.016) * (1 + 2.2 * near)
            lean = float(np.clip(rng.normal(0, 0.05), -0.1, 0.1))
            reach = girth + 0.5 * abs(lean)
            at = slice(max(0, int((middle - reach) * height)), int((middle + reach) * height) + 2)
            across = (x[:, at] - middle - lean * (y - 0.5)) / girth
            trunk = (1 - np.abs(across)) * girth * height * (y < ground + 0.04 + 0.1 * near)
            bark = _ramp(across * 0.5 * np.sign(light_x - middle) + 0.5, (0.13, 0.1, 0.07), (0.36, 0.27, 0.17))
            bark = bark * (0.75 + 0.5 * leaves[:, at, None]) + (1 - near) * glow[:, at, None] * 0.4
            _cover(field[:, at], trunk, bark)
        bright = leaves * 0.5 + 0.7 * glow * (1 - 0.5 * near)
        shade = _ramp(bright, (0.05, 0.14, 0.05), (0.27 + green, 0.5, 0.13), (0.8, 0.9, 0.4))
        _cover(field, (leaves - 0.4 - 1.1 * (y - 0.05 + 0.12 * near)) * 25, shade)
    floor = _noise(rng, height, width, 30, 14, 4)
    soil = _ramp(floor * 0.7 + 0.5 * glow, (0.1, 0.12, 0.05), (0.34, 0.38, 0.14), (0.72, 0.7, 0.32))
    _cover(field, np.clip((y - ground - 0.05 * (floor - 0.5)) * 20, 0, 1), soil)
    angle = x - light_x + (y - 0.1) * rng.uniform(-0.7, 0.7)
    return field + (np.exp(-((angle / 0.35) ** 2)) * (0.5 + 0.5 * np.sin(angle * 40)) * (1 - y) * 0.16)[..., None]


def _city(rng: np.random.Generator, height: int, width: int) -> Field:
    y, _ = grid(height, width)
    dusk = np.array([(0.36, 0.2, 0.42), (0.16, 0.28, 0.5), (0.5, 0.26, 0.3)])[rng.integers(3)]
    shore, lamps = rng.uniform(0.76, 0.84), [(255, 214, 130), (255, 236, 190), (190, 220, 255)]
    sky = _ramp(y / shore, (0.02, 0.03, 0.10), dusk)
    draw, canvas, unit = _canvas(np.broadcast_to(sky, (height, width, 3)))
    ground = unit * shore
    for layer in range(3):  # far to near: lower, darker
        left, wall = 0.0, _tint(dusk, 107 * (0.75 - 0.3 * layer))
        while left < canvas.width:
            wide, top = unit * rng.uniform(0.07, 0.15), ground - unit * rng.uniform(0.2, 0.62) * (1.05 - 0.22 * layer)
            middle, step = left + wide / 2, unit * rng.uniform(0.02, 0.028)
            draw.rectangle((left, top, left + wide, unit), fill=wall)
            if rng.random() < 0.25:
                draw.line((middle, top - 0.07 * unit, middle, top), fill=wall, width=3)
            lamp = lamps[rng.integers(3)]
            for y1 in np.arange(top + step, ground - step, step * 1.25):
                for x1 in np.arange(left + step * 0.5, left + wide - step * 0.7, step):
                    if rng.random() < 0.42:
                        fill = _tint(lamp, rng.uniform(0.45, 1) * (0.6 + 0.2 * layer))
                        draw.rectangle((x1, y1, x1 + step * 0.5, y1 + step * 0.6), fill=fill)
            left += wide + unit * rng.uniform(-0.02, 0.04)
    field = to_field(canvas.reduce(2))
    _cover(field, (rng.random((height, width)) > 0.9985) * (y < 0.3) * 0.7, (1.0, 1.0, 1.0))  # stars
    row = int(shore * height)
    ripple = (np.sin(np.arange(height - row) * 1.3) * 2 + rng.normal(0, 1, height - row)).astype(int)
    for down, shift in enumerate(ripple):
        field[row + down] = np.roll(field[max(row - 1 - down, 0)], shift, axis=0) * 0.55
    return field + to_field(to_picture(field).filter(ImageFilter.BoxBlur(height / 40))) * 0.7  # lamps bloom


def _desert(rng: np.random.Generator, height: int, width: int) -> Field:
    y, x = grid(height, width)
    sand, warm = np.array([0.93, rng.uniform(0.6, 0.72), rng.uniform(0.34, 0.46)]), rng.uniform(0.8, 1.0)
    field = _ramp(y * 2, (0.22 * warm, 0.47, 0.78), (0.62, 0.78, 0.9), (0.97, 0.9, 0.76)) * np.ones_like(x)[..., None]
    side = float(rng.choice([-1, 1]))
    ripples = _noise(rng, height, width, 5, 4, 2) * 0.1
    for layer in range(4):
        near = layer / 3
        base, size = 0.42 + 0.16 * layer + rng.uniform(-0.03, 0.03), rng.uniform(0.8, 1.4) * (0.5 + near)
        phase, high = rng.uniform(0, 6), rng.uniform(0.07, 0.13) * (0.7 + 0.6 * near)

        def crest(at: Field, size: float = size, phase: float = phase) -> Field:
            return np.abs(np.sin(at / size * 1.6 + phase + 0.3 * np.sin(at * 2.1 + phase))).astype(np.float32)

        top = base - high * (1 - crest(x) ** 0.8)
        rows = slice(int(top.min() * height), None)
        below = np.clip(y[rows] - top, 0, 1)
        bent = x + side * (0.9 * below + 0.6 * np.sin(below * 9 + phase) * below)  # the ridge winds down the slope
        slope = (crest(bent + 0.01) - crest(bent - 0.01)) * side * 40
        lit = np.clip(0.5 + slope, 0, 1) * np.clip(1 - below / (0.35 + 0.1 * near), 0.25, 1) + 0.2
        wind = np.sin((y[rows] + ripples[rows] + 0.06 * x * side) / (0.008 + 0.03 * (y[rows] - 0.35).clip(0)))
        shade = _ramp(lit + wind * 0.03 * near, sand * (0.5, 0.42, 0.45), sand * 0.86, np.minimum(sand * 1.16, 1))
        _cover(field[rows], (y[rows] - top) * height, shade * (0.9 + 0.1 * near) + (1 - near) * 0.08)
    return field


def _mountains(rng: np.random.Generator, height: int, width: int) -> Field:
    y, x = grid(height, width)
    sky = [(0.2, 0.42, 0.74), (0.34, 0.5, 0.72), (0.42, 0.46, 0.66)][rng.integers(3)]
    field = _ramp(y * 1.7, sky, (0.86, 0.9, 0.95)) * np.ones_like(x)[..., None]
    _cover(field, np.clip(_noise(rng, height, width, 5, 3) * 2.5 - 1.4, 0, 0.7), (1.0, 1.0, 1.0))
    for layer in range(3):
        near = layer / 2
        peaks = _noise(rng, 1, width, 1, max(2, round((2.3 + 0.75 * layer) * width / height)), 6) * (0.42 - 0.1 * layer)
        top = 0.5 + 0.14 * layer - peaks
        rows = slice(int(top.min() * height), None)
        relief = _noise(rng, height - int(top.min() * height), width, 4, max(2, 5 * width // height), 5)
        lit = 0.55 + np.gradient(relief + 2.5 * peaks, axis=1) * width * 0.11
        snow = (0.6 + 0.06 * layer - y[rows] + (relief - 0.5) * 0.4) * 25
        stone = _ramp(lit, (0.12, 0.14, 0.2), (0.4, 0.4, 0.44))
        _cover(stone, snow, _ramp(lit, (0.42, 0.53, 0.74), (0.84, 0.89, 0.97), (1.0, 1.0, 1.0)))
        haze = np.multiply((0.32, 0.35, 0.38), 1 - near, dtype=np.float32)
        _cover(field[rows], (y[rows] - top) * height, stone * (0.6 + 0.4 * near) + haze)
    draw, canvas, unit = _canvas(field)
    for _ in range(rng.integers(40, 80)):
        foot, stem, tall = rng.uniform(0.92, 1.08) * unit, rng.uniform(0, canvas.width), rng.uniform(0.1, 0.24) * unit
        green = _tint((18, 44, 36), rng.uniform(0.6, 1.3))
        for part in range(4):
            tip, wide = foot - tall * (1 - part * 0.2), tall * (0.07 + 0.055 * part)
            draw.polygon([(stem, tip), (stem - wide, tip + tall * 0.36), (stem + wide, tip + tall * 0.36)], fill=green)
    return to_field(canvas.reduce(2))


def _flowers(rng: np.random.Generator, height: int, width: int) -> Field:
    y, _ = grid(height, width)
    meadow = _noise(rng, height, width, 4, 5, 3) * 0.7 + 0.5 * (1 - y) - 0.1
    draw, canvas, unit = _canvas(_ramp(meadow, (0.06, 0.2, 0.05), (0.3, 0.5, 0.13), (0.72, 0.82, 0.42)))
    for _ in range(150):  # blades of grass
        foot, base = rng.uniform(0, canvas.width), rng.uniform(0.5, 1.1) * unit
        tip = foot + rng.normal(0, 0.06) * unit, base - rng.uniform(0.1, 0.4) * unit
        blade = [(foot, base), (foot + 0.012 * unit, base), tip]
        draw.polygon(blade, fill=_tint((84, 138, 44), rng.uniform(0.4, 1.15)))
    colours = [(232, 54, 62), (250, 196, 40), (246, 240, 238), (216, 80, 168), (124, 84, 206), (250, 128, 42)]
    kinds, around = rng.choice(len(colours), 2, replace=False), np.linspace(0, 2 * np.pi, 14)
    for size in np.sort(rng.uniform(0.03, 0.13, rng.integers(14, 26))) * unit:  # small and far to large and near
        centre = rng.uniform(0, canvas.width), rng.uniform(0.0, 0.24) * unit + size * 5.2
        colour, petals, turn = colours[kinds[rng.integers(2)]], int(rng.integers(5, 10)), rng.uniform(0, 6)
        stem = *centre, centre[0] + rng.normal(0, 0.02) * unit, unit
        draw.line(stem, fill=(58, 104, 34), width=max(2, int(size / 9)))
        along, across = size * (0.52 + 0.5 * np.cos(around)), size * 1.5 / petals * np.sin(around)
        for petal in range(petals * 2):  # a ring of petals on top of another
            upper = petal >= petals
            angle = turn + (petal + 0.5 * upper) * np.pi * 2 / petals
            px = centre[0] + along * np.cos(angle) - across * np.sin(angle)
            py = centre[1] + 0.85 * (along * np.sin(angle) + across * np.cos(angle))
            shade = 0.72 + 0.14 * upper + 0.14 * np.sin(angle + 4)
            draw.polygon(list(zip(px, py, strict=True)), fill=_tint(colour, shade))
        heart = (120, 70, 20) if colour[1] > 150 else (250, 204, 60)
        draw.circle(centre, size * 0.24, fill=heart)
    return to_field(canvas.reduce(2))


def _planet(rng: np.random.Generator, height: int, width: int) -> Field:
    y, x = grid(height, width)
    hues = [
        ((0.34, 0.12, 0.42), (0.1, 0.3, 0.5)),
        ((0.1, 0.34, 0.4), (0.3, 0.14, 0.4)),
        ((0.42, 0.2, 0.16), (0.2, 0.14, 0.4)),
    ]
    cloud, other = hues[rng.integers(3)]
    mist = _noise(rng, height, width, 3, 4, 5)
    field = _ramp(mist**2.5, (0.01, 0.01, 0.04), np.multiply(cloud, 0.6), other)
    stars = rng.random((height, width)).astype(np.float32)
    _cover(field, np.clip((stars - 0.993) * 150, 0, 1), (1.0, 0.97, 0.92))
    centre_x, centre_y, radius = rng.uniform(0.3, 0.7) * x.max(), rng.uniform(0.4, 0.6), rng.uniform(0.2, 0.32)
    tilt, sun = rng.uniform(-0.5, 0.5), rng.uniform(0, 6.28)  # angles
    sun_x, sun_y = math.cos(sun) * 0.8, math.sin(sun) * 0.5
    u, v = (x - centre_x) / radius, (y - centre_y) / radius
    u, v = u * math.cos(tilt) + v * math.sin(tilt), v * math.cos(tilt) - u * math.sin(tilt)
    ball = np.sqrt(np.clip(1 - u**2 - v**2, 0, 1))
    swirl = _noise(rng, height, width, 12, 4, 4)
    bands = 0.5 + 0.5 * np.sin(v * rng.uniform(7, 14) + swirl * 2.4)
    first, second = rng.uniform(0.35, 1, 3), rng.uniform(0.35, 1, 3)
    lit = np.clip(u * sun_x + v * sun_y + ball * 0.6, 0.02, 1)
    _cover(
        field, (1 - np.hypot(u, v)) * radius * height, _ramp(bands, first * 0.6, first, second) * lit[..., None] * 1.15
    )
    if rng.random() < 0.6:
        ring = np.hypot(u, v / 0.3)
        there = np.clip((ring - 1.3) * 20, 0, 1) * np.clip((2.0 - ring) * 20, 0, 1) * (0.55 + 0.35 * np.sin(ring * 40))
        _cover(field, there * ((np.hypot(u, v) > 1) | (v > 0)), np.minimum(second * 1.1, 1))
    return field


def _window(rng: np.random.Generator, height: int, width: int) -> Field:
    y, x = grid(height, width)
    tall = rng.uniform(0.05, 0.07)
    row = np.floor(y / tall)
    column = x / (tall * 2.6) + 0.5 * (row % 2)
    brick = rng.random((64, 64), np.float32)[row.astype(int) % 64, np.floor(column).astype(int) % 64]
    tone = [(0.62, 0.27, 0.2), (0.55, 0.34, 0.26), (0.7, 0.4, 0.28)][rng.integers(3)]
    rough = _noise(rng, height, width, 40, 60, 3)
    field = np.multiply(tone, (0.66 + 0.42 * brick + 0.3 * (rough - 0.5))[..., None])
    gap = np.minimum((y / tall) % 1, (column % 1) * 2.6)
    _cover(field, np.clip((0.15 - gap) * 14, 0, 1), (0.74 + 0.1 * rough[..., None]) * np.array((0.98, 0.94, 0.88)))
    draw, canvas, unit = _canvas(field)
    edge, wide, high = 0.03 * unit, rng.uniform(0.42, 0.6) * unit, rng.uniform(0.52, 0.66) * unit
    left, top = rng.uniform(0.3, 0.7) * (canvas.width - wide), rng.uniform(0.12, 0.2) * unit
    right, bottom = left + wide, top + high
    frame = [(240, 238, 230), (70, 104, 92), (120, 70, 44)][rng.integers(3)]
    glass = [(120, 164, 204), (244, 196, 116), (58, 78, 104)][rng.integers(3)]  # day, lit inside, dusk
    draw.rectangle((left - edge, top - 2 * edge, right + edge, top - 0.4 * edge), fill=(196, 184, 168))
    draw.rectangle((left, top, right, bottom), fill=frame)
    columns, rows = int(rng.integers(2, 4)), int(rng.integers(2, 4))
    pane_w, pane_h = (wide - edge) / columns, (high - edge) / rows
    for pane in range(columns * rows):
        px, py = left + edge + pane % columns * pane_w, top + edge + pane // columns * pane_h
        for line in range(int(pane_h - edge)):
            fill = _tint(glass, 1.1 - 0.45 * (py + line - top) / high)
            draw.line((px, py + line, px + pane_w - edge, py + line), fill=fill)
        shine = [(px + pane_w * 0.1, py), (px + pane_w * 0.4, py), (px, py + pane_h * 0.6), (px, py + pane_h * 0.2)]
        draw.polygon(shine, fill=_tint(glass, 1.25))
    draw.rectangle((left - 2 * edge, bottom, right + 2 * edge, bottom + 1.3 * edge), fill=(206, 196, 182))
    draw.rectangle((left - 2 * edge, bottom + 1.3 * edge, right + 2 * edge, bottom + 2 * edge), fill=(70, 40, 32))
    return to_field(canvas.reduce(2))


def grid(height: int, width: int) -> tuple[Field, Field]:
    """y (H, 1) from 0 to 1, and x (1, W) in the same unit."""
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]
    return y / height, x / height


def _noise(rng: np.random.Generator, height: int, width: int, rows: int, columns: int, octaves: int = 4) -> Field:
    """Clouds (H, W), 0…1: random grids, each twice as fine and half as strong as the one before."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        cells = rng.random((min(rows << octave, height), min(columns << octave, width)), np.float32)
        total += np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)) * 0.5**octave
    return (total - total.min()) / (np.ptp(total) + 1e-6)


def _ramp(at: Field, *colours: npt.ArrayLike) -> Field:
    """`at` (H, W), 0…1, to colours (H, W, 3) between those given."""
    stops = np.linspace(0, 255, len(colours))
    table = np.stack([np.interp(np.arange(256), stops, band) for band in np.asarray(colours).T], axis=1)
    return table.astype(np.float32).take((np.clip(at, 0, 1) * 255).astype(np.uint8), axis=0)


def _light(strength: Field, colour: npt.ArrayLike) -> Field:
    """What `strength` (H, W) of light of one colour adds: (H, W, 3)."""
    return strength[..., None] * np.asarray(colour, np.float32)


def _cover(field: Field, mask: Field, colour: npt.ArrayLike) -> None:
    """Lays `colour` over `field` in place, `mask` (H, W) saying how much of it."""
    share, colour = np.clip(mask, 0, 1).astype(np.float32, copy=False), np.asarray(colour, np.float32)
    for band in range(3):  # a quarter of the time of all three at once
        field[..., band] += share * (colour[..., band] - field[..., band])


def _canvas(field: Field) -> tuple[ImageDraw.ImageDraw, Image.Image, int]:
    """What to draw shapes with, the canvas of twice the size (for smooth edges), and its height in pixels."""
    small = to_picture(field)
    canvas = small.resize((2 * small.width, 2 * small.height), Image.Resampling.NEAREST)
    return ImageDraw.Draw(canvas), canvas, canvas.height


def _tint(colour: Sequence[float] | Field, strength: float) -> tuple[int, ...]:
    """`colour` times `strength`, as Pillow's drawing takes it: whole numbers up to 255."""
    return tuple(min(int(band * strength), 255) for band in colour)


def to_picture(field: Field) -> Image.Image:
    return Image.fromarray((np.clip(field, 0, 1) * 255 + 0.5).astype(np.uint8))


def to_field(picture: Image.Image) -> Field:
    return np.asarray(picture, np.float32) / 255


PAINTERS: dict[str, Painter] = {
    "sunset": _sunset, "forest": _forest, "city": _city, "desert": _desert,
    "mountains": _mountains, "flowers": _flowers, "planet": _planet, "window": _window,
}  # fmt: skip
