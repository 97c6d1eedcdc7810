"""Faces drawn by formula: a data set that needs no download and has CelebA's forty attributes, most of them drawn.

A face is a stack of soft-edged shapes (signed distances turned into coverage) on a lit head: background, shoulders,
hair, head, features, accessories. Position, tilt, turn, scale, light, skin, hair, eyes, clothes and background vary
from face to face, beside the attributes. Everything is computed for a whole block of faces at once.
"""

import numpy as np
from tqdm import tqdm

ATTRIBUTES = tuple(
    '5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair '
    'Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male '
    'Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks '
    'Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace '
    'Wearing_Necktie Young'.split()
)
BLOCK = 500  # faces drawn at once, with a random generator of their own

HAIR = {
    'Black_Hair': (0.09, 0.07, 0.07),
    'Brown_Hair': (0.38, 0.22, 0.12),
    'Blond_Hair': (0.90, 0.74, 0.42),
    'Gray_Hair': (0.70, 0.70, 0.72),
    'red': (0.62, 0.24, 0.10),
}


def draw_faces(n, size=32, seed=0):
    """-> images (n, 3, size, size) uint8; face i is the same whatever n is, and the same person at any size"""
    generators = tqdm(
        block_generators(n, seed),
        'drawing faces',
        unit='image',
        unit_scale=BLOCK,
        dynamic_ncols=True,
        disable=n <= BLOCK,
    )
    blocks = [Painter(sample_attributes(rng), sample_look(rng), size).face() for rng in generators]
    return np.concatenate(blocks)[:n]


def face_attributes(n, seed=0):
    """-> attributes (n, 40) bool of the faces that draw_faces draws; those that are not drawn are False"""
    blocks = [sample_attributes(rng) for rng in block_generators(n, seed)]
    never = np.zeros(BLOCK, bool)
    return np.concatenate(
        [np.stack([has.get(name, never) for name in ATTRIBUTES], axis=1) for has in blocks]
    )[:n]


def block_generators(n, seed):
    return [np.random.default_rng((seed, block)) for block in range(-(-n // BLOCK))]


def sample_attributes(rng):
    """-> {name: (BLOCK,) bool}, as independent as a face allows"""

    def coin(p, of=True):
        return (rng.random(BLOCK) < p) & of

    male = coin(0.5)
    has = {'Male': male, 'Young': coin(0.6), 'Bald': coin(0.5 * 0.25 * male + 0.02)}
    hair = ~has['Bald']
    kind = rng.choice(5, BLOCK, p=(0.28, 0.28, 0.22, 0.16, 0.06))
    for i, name in enumerate(HAIR):
        has[name] = hair & (kind == i)
    has['Wavy_Hair'] = coin(0.45, hair)
    has['Straight_Hair'] = hair & ~has['Wavy_Hair']
    has['Wearing_Hat'] = coin(0.15)
    has['Bangs'] = coin(0.3, hair & ~has['Wearing_Hat'])
    has['Receding_Hairline'] = coin(0.45, hair & male & ~has['Bangs'] & ~has['Wearing_Hat'])
    has['Sideburns'] = coin(0.4, hair & male)
    has['Goatee'], has['Mustache'] = coin(0.3, male), coin(0.35, male)
    has['5_o_Clock_Shadow'] = coin(0.25, male)
    has['No_Beard'] = ~(
        has['Goatee'] | has['Mustache'] | has['Sideburns'] | has['5_o_Clock_Shadow']
    )
    for name, p in {
        'Smiling': 0.5,
        'Mouth_Slightly_Open': 0.4,
        'Eyeglasses': 0.3,
        'Narrow_Eyes': 0.2,
        'Big_Nose': 0.25,
        'Big_Lips': 0.3,
        'Bushy_Eyebrows': 0.25,
        'Arched_Eyebrows': 0.3,
        'Bags_Under_Eyes': 0.2,
        'Chubby': 0.2,
        'Pale_Skin': 0.2,
        'Rosy_Cheeks': 0.2,
        'Pointy_Nose': 0.25,
        'High_Cheekbones': 0.3,
        'Wearing_Necklace': 0.2,
    }.items():
        has[name] = coin(p)
    has['Oval_Face'] = coin(0.35, ~has['Chubby'])
    has['Double_Chin'] = coin(0.5, has['Chubby'])
    for name, p, p_male in (
        ('Wearing_Lipstick', 0.5, 0.1),
        ('Heavy_Makeup', 0.4, 0.05),
        ('Wearing_Earrings', 0.4, 0.12),
    ):
        has[name] = coin(np.where(male, p_male, p))
    has['Wearing_Necktie'] = coin(np.where(male, 0.4, 0.1), ~has['Wearing_Necklace'])
    return has


def sample_look(rng):
    """-> {name: (BLOCK,) or (BLOCK, 3) float32} of what varies beside the attributes"""

    def normal(scale, *shape):
        return (
            rng.normal(0, scale, (BLOCK, *shape)).clip(-2.2 * scale, 2.2 * scale).astype(np.float32)
        )

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (BLOCK, *shape)).astype(np.float32)

    return {
        'x': normal(0.02),
        'y': normal(0.015),
        'tilt': normal(0.03),
        'turn': normal(0.03),
        'zoom': uniform(0.97, 1.03),
        'light': uniform(-0.7, 0.7),
        'light_up': uniform(0.2, 0.6),
        'skin': uniform(0, 1),
        'skin_hue': normal(0.02, 3),
        'hair_tone': normal(0.035, 3),
        'hair_length': uniform(0, 1),
        'wave': uniform(0, 6.3),
        'part': normal(0.15),
        'background': uniform(0.3, 0.8, 1) + uniform(-0.2, 0.2, 3),
        'background_tilt': uniform(-0.2, 0.2, 2),
        'clothes': uniform(0.2, 0.75, 1) + uniform(-0.25, 0.25, 3),
        'accent': uniform(0.1, 0.8, 3),
        'hat': uniform(0.15, 0.7, 1) + uniform(-0.15, 0.2, 3),
        'tint': uniform(0, 1),
        'eye': uniform(0, 1),
        'eye_gap': normal(0.015),
        'jaw': normal(0.025),
        'nose_length': normal(0.015),
        'mouth_y': normal(0.012),
    }


class Painter:
    """Paints one block. Coordinates are (BLOCK, size, size): x to the right, y down, the picture being -1..1."""

    def __init__(self, has, look, size):
        self.has = {name: value.astype(np.float32)[:, None, None] for name, value in has.items()}
        self.look = {
            name: value.reshape(BLOCK, 1, 1, *value.shape[1:]) for name, value in look.items()
        }
        self.pixel = 2 / size
        axis = (np.arange(size, dtype=np.float32) + 0.5) * self.pixel - 1
        self.page_x, self.page_y = axis[None, None, :], axis[None, :, None]
        look = self.look
        x, y = (
            (self.page_x - look['x']) / look['zoom'],
            (self.page_y - look['y'] - 0.04) / look['zoom'],
        )
        cos, sin = np.cos(look['tilt']), np.sin(look['tilt'])
        self.x, self.y = cos * x + sin * y, cos * y - sin * x  # head's own coordinates
        self.turned = self.x - look['turn']  # features slide over the head as it turns
        self.canvas = np.empty((BLOCK, size, size, 3), np.float32)

    def cover(self, distance, soft=1.0):
        """Signed distance (negative inside) -> coverage 0..1, with an edge of `soft` pixels"""
        return (0.5 - distance / (self.pixel * soft)).clip(0, 1)

    def blob(self, x, y, cx, cy, rx, ry):
        """A soft spot: 1 at its centre, falling like a Gaussian"""
        return np.exp(-(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2))

    def paint(self, mask, colour):
        self.canvas += mask[..., None] * (colour - self.canvas)

    def face(self):
        """-> images (BLOCK, 3, size, size) uint8"""
        self.background()
        self.hair_behind()
        self.shoulders()
        self.head()
        self.eyes()
        self.nose()
        self.mouth()
        self.beard()
        self.hair_in_front()
        self.glasses()
        self.hat()
        return (self.canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 3, 1, 2)

    def background(self):
        tilt = self.look['background_tilt']
        shade = tilt[..., 0] * self.page_x + tilt[..., 1] * self.page_y
        shade = shade - 0.12 * (self.page_x**2 + self.page_y**2)
        self.canvas[:] = self.look['background'] + shade[..., None]

    def hair_colour(self):
        colour = np.zeros((BLOCK, 1, 1, 3), np.float32)
        for name, value in HAIR.items():
            colour = colour + self.has[name][..., None] * np.float32(value)
        return colour + self.look['hair_tone'] * (0.4 + colour)

    def waves(self):
        """How far the hair's outline bulges"""
        return 0.05 * self.has['Wavy_Hair'] * np.sin(13 * self.y + self.look['wave']) - 0.01

    def hair_behind(self):
        has, look, x, y = self.has, self.look, self.x, self.y
        self.skin = skin_colour(look['skin'], has['Pale_Skin']) + look['skin_hue']
        self.hair = self.hair_colour()
        self.visible_hair = 1 - has['Bald']
        # women's hair falls to the shoulders or below, men's ends at the ears
        bottom = np.where(
            has['Male'] > 0, 0.0 + 0.1 * look['hair_length'], 0.42 + 0.5 * look['hair_length']
        )
        width = 0.60 + 0.07 * has['Wavy_Hair'] + np.where(has['Male'] > 0, -0.045, 0.0)
        top = np.hypot(x / width, np.minimum(y + 0.12, 0) / 0.72) - 1 + self.waves()
        mask = self.cover(top * 0.6) * self.cover(y - bottom, 3)
        shade = 0.80 + 0.12 * np.cos(9 * x + look['wave'])
        self.paint(mask * self.visible_hair, self.hair * shade[..., None])

    def shoulders(self):
        has, look = self.has, self.look
        x, y = self.page_x - look['x'] * 0.6, self.page_y - look['y'] * 0.5
        wide = np.where(has['Male'] > 0, 0.98, 0.84) + 0.06 * has['Chubby']
        body = (np.abs(x / wide) ** 2.6 + np.abs((y - 1.25) / 0.58).clip(0, 9) ** 2.6) - 1
        fold = 0.9 + 0.15 * x * look['light'] - 0.25 * (y - 0.8)
        self.paint(self.cover(body * 0.4), look['clothes'] * fold[..., None])
        neck_wide = np.where(has['Male'] > 0, 0.24, 0.19) + 0.03 * has['Chubby']
        neck = np.maximum(
            np.abs(x) - neck_wide - 0.5 * (y - 0.62).clip(0, 1) ** 2,
            np.abs(y - 0.55) - 0.25 + 0.5 * np.abs(x),
        )
        shadow = 0.62 + 0.5 * (y - 0.55).clip(0, 0.5)
        self.paint(self.cover(neck), self.skin * shadow[..., None])
        knot = np.maximum(np.abs(x) - 0.07 - 0.12 * (y - 0.72).clip(0, 1), 0.70 - y)
        collar = np.maximum(np.abs(np.abs(x) - 0.14) - 0.10, np.abs(y - 0.76) - 0.07)
        tie = has['Wearing_Necktie']
        self.paint(self.cover(collar) * tie, np.float32((0.95, 0.95, 0.96)))
        self.paint(self.cover(knot) * tie, look['accent'])
        chain = np.abs(np.hypot(x, (y - 0.56) * 1.1) - 0.30) - 0.028
        self.paint(
            self.cover(np.maximum(chain, 0.60 - y)) * has['Wearing_Necklace'],
            np.float32((0.98, 0.88, 0.45)),
        )

    def head(self):
        has, look, x, y = self.has, self.look, self.x, self.y
        for side in (-1, 1):  # ears
            ear = np.hypot((x - side * 0.50 + 0.3 * look['turn']) / 0.09, (y - 0.06) / 0.14) - 1
            self.paint(self.cover(ear * 0.1), self.skin * 0.82)
        # an ellipse whose lower half is squared by a jaw
        rx = 0.475 + 0.05 * has['Chubby'] - 0.035 * has['Oval_Face']
        ry = np.where(y > 0, 0.60 + 0.05 * has['Oval_Face'] + 0.02 * has['Male'], 0.62)
        squareness = (
            0.5 * has['Male'] + 0.7 * has['Chubby'] - 0.2 * has['Oval_Face'] + 4 * look['jaw']
        )
        power = np.where(y > 0, 2 + squareness, 2)
        u, v = x / rx, y / ry
        radius = (np.abs(u) ** power + np.abs(v) ** power) ** (1 / power)
        self.inside = self.cover((radius - 1) * 0.5)
        height = np.sqrt((1 - radius**2).clip(0.02, 1))
        light = (
            0.66
            + 0.34 * height
            + 0.17 * look['light'] * u * (1.2 - height)
            - 0.10 * look['light_up'] * v
        )
        cheek = sum(self.blob(self.turned, y, side * 0.27, 0.20, 0.15, 0.10) for side in (-1, 1))
        light = light + 0.10 * cheek * (has['High_Cheekbones'] + 0.5 * has['Smiling'])
        light = light - 0.25 * has['Double_Chin'] * self.blob(
            x, y + 0.5 * x**2, 0, 0.50, 0.22, 0.03
        )
        old = 1 - has['Young']  # furrows from nose to mouth and across the forehead
        for side in (-1, 1):
            furrow = np.abs(self.turned - side * (0.13 + 0.30 * (y - 0.15))) / 0.03
            light = light - 0.16 * old * np.exp(-(furrow**2)) * self.cover(
                np.abs(y - 0.27) - 0.10, 2
            )
        for line in (-0.36, -0.27):
            light = light - 0.13 * old * np.exp(-(((y - line) / 0.022) ** 2)) * self.cover(
                np.abs(self.turned) - 0.2, 3
            )
        self.paint(self.inside, self.skin * light[..., None])
        rosy = cheek.clip(0, 1) * has['Rosy_Cheeks'] * self.inside
        self.paint(0.65 * rosy, np.float32((0.93, 0.35, 0.36)))
        for side in (-1, 1):
            earring = np.hypot(x - side * 0.53 + 0.3 * look['turn'], y - 0.27) - 0.062
            self.paint(
                self.cover(earring) * has['Wearing_Earrings'], np.float32((0.99, 0.86, 0.35))
            )

    def eyes(self):
        has, look, y = self.has, self.look, self.y
        gap = 0.205 + look['eye_gap']
        iris = np.stack(
            [
                0.14 + 0.25 * look['eye'],
                0.12 + 0.33 * look['eye'],
                0.10 + 0.55 * look['eye'] ** 1.5,
            ],
            axis=-1,
        )
        open_ = 0.070 * (1 - 0.5 * has['Narrow_Eyes']) * (1 - 0.10 * has['Smiling'])
        for side in (-1, 1):
            x = self.turned - side * gap
            bags = self.blob(x, y, 0, 0.115, 0.10, 0.04) * has['Bags_Under_Eyes']
            self.paint(0.45 * bags, self.skin * np.float32((0.55, 0.42, 0.48)))
            socket = self.blob(x, y, 0, -0.055, 0.15, 0.075)
            self.paint(0.22 * socket * self.inside, self.skin * 0.45)
            makeup = self.blob(x, y, 0.01 * side, -0.075, 0.125, 0.06) * has['Heavy_Makeup']
            self.paint(0.85 * makeup, 0.35 * look['accent'] + np.float32((0.25, 0.10, 0.38)))
            white = np.hypot(x / 0.115, y / open_) - 1
            lid = np.hypot(x / 0.135, (y + 0.014) / (open_ + 0.016)) - 1
            self.paint(0.8 * self.cover(lid * 0.1), self.skin * 0.25)
            eye = self.cover(white * 0.09)
            self.paint(eye, np.float32((0.96, 0.95, 0.94)))
            self.paint(eye * self.cover(np.hypot(x - 0.25 * look['turn'], y) - 0.064), iris)
            self.paint(
                eye * self.cover(np.hypot(x - 0.25 * look['turn'], y) - 0.034),
                np.float32((0.03, 0.03, 0.04)),
            )
            brow_y = -0.165 - 0.03 * has['Arched_Eyebrows'] + 0.02 * has['Male']
            arch = (
                brow_y
                + (1.5 + 5 * has['Arched_Eyebrows']) * (x - 0.02 * side) ** 2
                - 0.06 * side * x
            )
            thick = 0.020 + 0.012 * has['Male'] + 0.026 * has['Bushy_Eyebrows']
            brow = np.maximum(np.abs(y - arch) - thick, np.abs(x) - 0.135)
            colour = np.where(self.visible_hair[..., None] > 0, self.hair, 0.25) * 0.6 + 0.02
            self.paint(0.9 * self.cover(brow), colour)

    def nose(self):
        has, look, x, y = self.has, self.look, self.turned, self.y
        x = x - 0.4 * look['turn']
        wide = 0.075 + 0.05 * has['Big_Nose'] - 0.02 * has['Pointy_Nose']
        tip = 0.235 + look['nose_length'] + 0.02 * has['Big_Nose']
        side = np.where(look['light'] > 0, -1, 1)
        bridge = self.blob(x, y, side * 0.055, 0.06, 0.035, 0.16)
        self.paint(0.35 * bridge, self.skin * 0.55)
        self.paint(0.45 * self.blob(x, y, 0, tip + 0.045, wide * 1.15, 0.03), self.skin * 0.35)
        self.paint(
            (0.30 + 0.2 * has['Big_Nose']) * self.blob(x, y, 0, tip - 0.02, wide * 0.7, 0.05),
            self.skin * 1.15 + 0.08,
        )
        self.paint(
            0.55 * has['Pointy_Nose'] * self.blob(x, y, 0, tip - 0.08, 0.03, 0.15),
            self.skin * 1.2 + 0.15,
        )
        for s in (-1, 1):
            self.paint(
                0.6 * self.blob(x, y, s * wide * 0.6, tip + 0.03, 0.03, 0.02), self.skin * 0.25
            )

    def mouth(self):
        has, look = self.has, self.look
        x, y = self.turned, self.y - 0.395 - look['mouth_y']
        wide = 0.165 + 0.05 * has['Smiling'] + 0.01 * has['Male']
        curve = has['Smiling'] * (0.045 - 2.3 * x**2) - (1 - has['Smiling']) * (0.012 - 0.6 * x**2)
        y = y - curve
        taper = (1 - (x / wide) ** 2).clip(0, 1)
        lips = (0.032 + 0.026 * has['Big_Lips']) * np.sqrt(taper)
        gap = (0.048 + 0.012 * has['Smiling']) * has['Mouth_Slightly_Open'] * taper
        natural = self.skin * np.float32((0.80, 0.55, 0.52))
        painted = np.float32((0.78, 0.07, 0.16)) * (0.75 + 0.4 * look['tint'][..., None])
        colour = natural + has['Wearing_Lipstick'][..., None] * (painted - natural)
        inside = self.cover(np.abs(x) - wide)
        self.paint(self.cover(np.abs(y) - lips - gap) * inside, colour)
        self.paint(
            self.cover(np.abs(y) - np.maximum(gap, 0.008)) * inside, np.float32((0.22, 0.05, 0.06))
        )
        teeth = np.maximum(np.abs(y + 0.3 * gap) - 0.6 * gap, np.abs(x) - 0.80 * wide)
        self.paint(self.cover(teeth) * has['Mouth_Slightly_Open'], np.float32((0.97, 0.96, 0.93)))

    def beard(self):
        has, x, y = self.has, self.turned, self.y
        colour = np.where(self.visible_hair[..., None] > 0, self.hair, 0.2) * 0.75
        lower = self.cover(0.22 - y, 6) * self.inside
        mouth = self.cover(np.hypot(x / 0.20, (y - 0.40) / 0.085) - 1, 8)
        self.paint(0.38 * lower * (1 - mouth) * has['5_o_Clock_Shadow'], self.skin * 0.35 + 0.03)
        wing = 0.315 + 0.9 * x**2
        moustache = np.maximum(
            np.abs(y - wing) - 0.038 * (1 - (x / 0.26) ** 2).clip(0.2, 1), np.abs(x) - 0.21
        )
        self.paint(0.93 * self.cover(moustache) * has['Mustache'], colour)
        goatee = np.hypot(x / 0.155, (y - 0.575) / 0.115) - 1
        self.paint(0.93 * self.cover(goatee * 0.12, 1.3) * has['Goatee'], colour)

    def hair_in_front(self):
        has, look, x, y = self.has, self.look, self.x, self.y
        outer = (
            np.hypot(x / (0.545 + 0.03 * has['Wavy_Hair']), (y + 0.03) / 0.70) - 1 + self.waves()
        )
        # the hairline: forehead is free below it
        rise = 0.30 * has['Receding_Hairline']
        line = -0.34 - 0.5 * rise - 0.5 * (x - look['part']) ** 2 * has['Receding_Hairline']
        line = line + (1.0 - 0.9 * has['Receding_Hairline']) * (x - 0.5 * look['part']) ** 2 * 1.6
        fringe = (
            -0.155 + 0.25 * (x - 0.5 * look['part']) ** 2 + 0.02 * np.sin(30 * x + look['wave'])
        )
        line = line + has['Bangs'] * (fringe - line)
        cap = np.maximum(outer * 0.6, y - line)
        temples = np.maximum(
            np.maximum(outer * 0.6, 0.43 - np.abs(x)),
            np.abs(y + 0.10) - 0.20 - 0.30 * (1 - has['Male']),
        )
        burns = np.maximum(np.abs(np.abs(x) - 0.425) - 0.055, np.abs(y - 0.12) - 0.17)
        shine = 0.85 + 0.30 * self.blob(x, y, 0.3 * look['light'], -0.50, 0.30, 0.10)
        shine = shine + 0.08 * np.sin(22 * x + 6 * has['Wavy_Hair'] * np.sin(9 * y) + look['wave'])
        colour = self.hair * shine[..., None] + 0.05 * (shine - 0.85)[..., None]
        self.paint(
            0.25 * self.blob(x, y, 0, -0.33, 0.40, 0.10) * self.inside * self.visible_hair,
            self.skin * 0.4,
        )
        for shape, share in (
            (cap, self.visible_hair),
            (temples, self.visible_hair),
            (burns, has['Sideburns']),
        ):
            self.paint(self.cover(shape, 1.3) * share, colour)

    def glasses(self):
        has, look, x, y = self.has, self.look, self.turned, self.y
        frame = np.float32((0.07, 0.06, 0.08)) + 0.25 * look['accent'] * (
            look['tint'][..., None] > 0.5
        )
        dark = 0.72 * (look['tint'] > 0.75)
        worn = has['Eyeglasses']
        for side in (-1, 1):
            lens = (np.abs((x - side * 0.215) / 0.175) ** 3 + np.abs((y - 0.01) / 0.135) ** 3) ** (
                1 / 3
            ) - 1
            self.paint(self.cover(lens * 0.14) * worn * dark, frame)
            self.paint(self.cover(np.abs(lens) * 0.14 - 0.024) * worn, frame)
        bridge = np.maximum(np.abs(x) - 0.045, np.abs(y + 0.02) - 0.02)
        arms = np.maximum(np.abs(y + 0.03) - 0.02, np.abs(np.abs(self.x) - 0.43) - 0.06)
        self.paint(self.cover(np.minimum(bridge, arms)) * worn, frame)

    def hat(self):
        has, look, x, y = self.has, self.look, self.x, self.y
        crown = np.maximum(
            np.hypot(x / 0.57, (y + 0.30) / 0.62) - 1, (y + 0.38 - 0.10 * x**2) / 0.62
        )
        brim = np.maximum(np.abs(y + 0.36 - 0.12 * x**2) - 0.05, np.abs(x) - 0.64)
        shade = 0.85 + 0.25 * self.blob(x, y, 0.4 * look['light'], -0.65, 0.3, 0.25)
        worn = has['Wearing_Hat']
        self.paint(
            0.35 * worn * self.blob(x, y, 0, -0.24, 0.45, 0.08) * self.inside, self.skin * 0.3
        )
        self.paint(self.cover(crown * 0.5) * worn, look['hat'] * shade[..., None])
        self.paint(self.cover(brim) * worn, look['hat'] * 0.7)


def skin_colour(tone, pale):
    """tone 0..1 from dark to light (B, 1, 1), pale 0 or 1 -> RGB (B, 1, 1, 3)"""
    stops = np.float32(
        [(0.36, 0.22, 0.15), (0.58, 0.38, 0.27), (0.78, 0.57, 0.43), (0.90, 0.72, 0.58)]
    )
    position = tone * 3
    colour = np.stack(
        [np.interp(position, range(4), stops[:, c]) for c in range(3)], axis=-1
    ).astype(np.float32)
    return colour + pale[..., None] * (np.float32((0.96, 0.83, 0.76)) - colour)
