"""Faces drawn by formula: a data set that needs no download and has the attributes of CelebA.

Of CelebA's forty attributes (Liu et al., 2015, "Deep Learning Face Attributes in the Wild"), 38 are
drawn; Attractive and Blurry are always absent.

A face is a stack of soft-edged shapes on a lit head: background, shoulders, hair, head, features,
accessories. Each shape is given by a signed distance, negative inside, which is turned into the
coverage of each pixel. Besides the attributes, position, tilt, turn, scale, light, colours and
proportions vary from face to face. A whole block of faces is drawn at once.
"""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

Array = np.ndarray
Number = float | np.ndarray  # one for all faces and pixels, or one for each

ATTRIBUTES = tuple(
    '5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose '
    'Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee '
    'Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard '
    'Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair '
    'Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie '
    'Young'.split()
)

# Faces are drawn in blocks of this many, each with a random generator of its own, so that a face
# does not depend on how many others are drawn.
BLOCK_SIZE = 500

# Probabilities of the attributes that depend on no other one.
INDEPENDENT_ATTRIBUTES = {
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
}
# Probabilities of the attributes that depend on the sex: of women, of men.
ATTRIBUTES_BY_SEX = {
    'Wearing_Lipstick': (0.5, 0.1),
    'Heavy_Makeup': (0.4, 0.05),
    'Wearing_Earrings': (0.4, 0.12),
}
HAIR_PROBABILITIES = (0.28, 0.28, 0.22, 0.16, 0.06)  # in the order of HAIR_COLOURS


def rgb(red: float, green: float, blue: float) -> Array:
    """Return a colour as an array (3,); 0 is black and 1 is white."""
    return np.array((red, green, blue), np.float32)


HAIR_COLOURS = {
    'Black_Hair': rgb(0.09, 0.07, 0.07),
    'Brown_Hair': rgb(0.38, 0.22, 0.12),
    'Blond_Hair': rgb(0.90, 0.74, 0.42),
    'Gray_Hair': rgb(0.70, 0.70, 0.72),
    'red': rgb(0.62, 0.24, 0.10),  # not an attribute of CelebA
}
SKIN_COLOURS = (  # from dark to light
    rgb(0.36, 0.22, 0.15),
    rgb(0.58, 0.38, 0.27),
    rgb(0.78, 0.57, 0.43),
    rgb(0.90, 0.72, 0.58),
)
PALE_SKIN = rgb(0.96, 0.83, 0.76)
COLLAR = rgb(0.95, 0.95, 0.96)
NECKLACE = rgb(0.98, 0.88, 0.45)
EARRING = rgb(0.99, 0.86, 0.35)
BLUSH = rgb(0.93, 0.35, 0.36)
BAGS_TINT = rgb(0.55, 0.42, 0.48)
EYE_SHADOW = rgb(0.25, 0.10, 0.38)
EYE_WHITE = rgb(0.96, 0.95, 0.94)
PUPIL = rgb(0.03, 0.03, 0.04)
LIP_TINT = rgb(0.80, 0.55, 0.52)
LIPSTICK = rgb(0.78, 0.07, 0.16)
MOUTH_INSIDE = rgb(0.22, 0.05, 0.06)
TEETH = rgb(0.97, 0.96, 0.93)
GLASSES_FRAME = rgb(0.07, 0.06, 0.08)


def draw_faces(n: int, size: int = 32, seed: int = 0) -> Array:
    """Draw ``n`` faces and return them as an array (n, 3, size, size) of uint8.

    Face i is the same whatever ``n`` is, and the same person at any size.
    """
    generators = tqdm(
        block_generators(n, seed),
        'drawing faces',
        unit='image',
        unit_scale=BLOCK_SIZE,
        dynamic_ncols=True,
        disable=n <= BLOCK_SIZE,
    )
    blocks = []
    for rng in generators:
        attributes = sample_attributes(rng)
        look = sample_look(rng)
        blocks.append(FacePainter(attributes, look, size).draw())
    return np.concatenate(blocks)[:n]


def face_attributes(n: int, seed: int = 0) -> Array:
    """Return the attributes (n, 40), boolean, of the faces that ``draw_faces`` draws."""
    absent = np.zeros(BLOCK_SIZE, bool)
    blocks = []
    for rng in block_generators(n, seed):
        has = sample_attributes(rng)
        columns = [has.get(name, absent) for name in ATTRIBUTES]
        blocks.append(np.stack(columns, axis=1))
    return np.concatenate(blocks)[:n]


def block_generators(n: int, seed: int) -> list[np.random.Generator]:
    """Return a random generator for each of the blocks that ``n`` faces need."""
    n_blocks = -(-n // BLOCK_SIZE)
    return [np.random.default_rng((seed, block)) for block in range(n_blocks)]


# ------------------------------------------------------------------------ what varies between faces


def sample_attributes(rng: np.random.Generator) -> dict[str, Array]:
    """Draw the attributes of a block, as independent of each other as a face allows.

    Returns boolean arrays (BLOCK_SIZE,) by name: CelebA's attributes and 'red', for red hair.
    """

    def coin(probability: Number, among: bool | Array = True) -> Array:
        return (rng.random(BLOCK_SIZE) < probability) & among

    male = coin(0.5)
    has = {'Male': male, 'Young': coin(0.6), 'Bald': coin(0.125 * male + 0.02)}

    hair = ~has['Bald']
    hair_colour = rng.choice(len(HAIR_COLOURS), BLOCK_SIZE, p=HAIR_PROBABILITIES)
    for i, name in enumerate(HAIR_COLOURS):
        has[name] = hair & (hair_colour == i)
    has['Wavy_Hair'] = coin(0.45, among=hair)
    has['Straight_Hair'] = hair & ~has['Wavy_Hair']

    has['Wearing_Hat'] = coin(0.15)
    hair_at_forehead = hair & ~has['Wearing_Hat']
    has['Bangs'] = coin(0.3, among=hair_at_forehead)
    has['Receding_Hairline'] = coin(0.45, among=hair_at_forehead & male & ~has['Bangs'])

    has['Sideburns'] = coin(0.4, among=hair & male)
    has['Goatee'] = coin(0.3, among=male)
    has['Mustache'] = coin(0.35, among=male)
    has['5_o_Clock_Shadow'] = coin(0.25, among=male)
    beard = has['Goatee'] | has['Mustache'] | has['Sideburns'] | has['5_o_Clock_Shadow']
    has['No_Beard'] = ~beard

    for name, probability in INDEPENDENT_ATTRIBUTES.items():
        has[name] = coin(probability)
    has['Oval_Face'] = coin(0.35, among=~has['Chubby'])
    has['Double_Chin'] = coin(0.5, among=has['Chubby'])
    for name, (of_women, of_men) in ATTRIBUTES_BY_SEX.items():
        has[name] = coin(np.where(male, of_men, of_women))
    necktie_probability = np.where(male, 0.4, 0.1)
    has['Wearing_Necktie'] = coin(necktie_probability, among=~has['Wearing_Necklace'])
    return has


@dataclass(frozen=True)
class Look:
    """What varies between faces besides the attributes; float32 arrays with one row per face.

    Lengths are in the picture's coordinates, in which its width is 2; colours have three columns.
    """

    x: Array  # position of the head
    y: Array
    tilt: Array  # of the head towards a shoulder, in radians
    turn: Array  # of the head to a side: how far the features move on it
    zoom: Array
    light: Array  # from the left (negative) or the right
    light_up: Array  # from above
    skin: Array  # from 0, dark, to 1, light
    skin_hue: Array
    hair_tone: Array
    hair_length: Array
    wave: Array  # phase of the waves in the hair
    part: Array  # where the hair is parted
    background: Array
    background_tilt: Array  # how its brightness changes along x and y
    clothes: Array
    accent: Array  # colour of tie, make-up and glasses
    hat: Array
    tint: Array  # of lipstick and glasses, from 0 to 1
    eye: Array  # from 0, brown, to 1, blue
    eye_gap: Array
    jaw: Array
    nose_length: Array
    mouth_y: Array


def sample_look(rng: np.random.Generator) -> Look:
    """Draw the look of a block of faces.

    The order of the draws decides what each seed gives, so it must not be changed.
    """

    def normal(scale: float, *shape: int) -> Array:
        values = rng.normal(0, scale, (BLOCK_SIZE, *shape))
        return values.clip(-2.2 * scale, 2.2 * scale).astype(np.float32)

    def uniform(low: float, high: float, *shape: int) -> Array:
        return rng.uniform(low, high, (BLOCK_SIZE, *shape)).astype(np.float32)

    return Look(
        x=normal(0.02),
        y=normal(0.015),
        tilt=normal(0.03),
        turn=normal(0.03),
        zoom=uniform(0.97, 1.03),
        light=uniform(-0.7, 0.7),
        light_up=uniform(0.2, 0.6),
        skin=uniform(0, 1),
        skin_hue=normal(0.02, 3),
        hair_tone=normal(0.035, 3),
        hair_length=uniform(0, 1),
        wave=uniform(0, 6.3),
        part=normal(0.15),
        background=uniform(0.3, 0.8, 1) + uniform(-0.2, 0.2, 3),
        background_tilt=uniform(-0.2, 0.2, 2),
        clothes=uniform(0.2, 0.75, 1) + uniform(-0.25, 0.25, 3),
        accent=uniform(0.1, 0.8, 3),
        hat=uniform(0.15, 0.7, 1) + uniform(-0.15, 0.2, 3),
        tint=uniform(0, 1),
        eye=uniform(0, 1),
        eye_gap=normal(0.015),
        jaw=normal(0.025),
        nose_length=normal(0.015),
        mouth_y=normal(0.012),
    )


# ------------------------------------------------------------------------------------------- shapes


def circle(x: Array, y: Array, radius: Number) -> Array:
    """Return the signed distance from a circle around the origin."""
    return np.hypot(x, y) - radius


def ellipse(x: Array, y: Array, radius_x: Number, radius_y: Number) -> Array:
    """Return the signed distance from an ellipse around the origin, in units of its radii."""
    return np.hypot(x / radius_x, y / radius_y) - 1


def rectangle(x: Array, y: Array, half_width: Number, half_height: Number) -> Array:
    """Return the signed distance from a rectangle around the origin."""
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def power_norm(x: Array, y: Array, power: Number) -> Array:
    """Return the p-norm of the points: its unit circle is round for p = 2, squarer above."""
    sum_of_powers = np.abs(x) ** power + np.abs(y) ** power
    return sum_of_powers ** (1 / power)


def spot(x: Array, y: Array, radius_x: Number, radius_y: Number) -> Array:
    """Return a soft spot: 1 at the origin, falling like a Gaussian."""
    return np.exp(-((x / radius_x) ** 2 + (y / radius_y) ** 2))


# ------------------------------------------------------------------------------------------ painter


class FacePainter:
    """Paints one block of faces.

    Coordinates are arrays that broadcast to (BLOCK_SIZE, size, size). x grows to the right and y
    downwards; both run from -1 to 1 over the picture. Attributes are 0 or 1, as float32.

    The coordinates of the picture are ``page_x`` and ``page_y``; those of the head, which is moved,
    scaled and tilted, ``x`` and ``y``. The features move sideways on the head as it turns, so they
    use ``turned_x`` in place of ``x``.
    """

    def __init__(self, attributes: dict[str, Array], look: Look, size: int) -> None:
        self.has = {
            name: with_pixel_axes(value.astype(np.float32)) for name, value in attributes.items()
        }
        look = Look(**{name: with_pixel_axes(value) for name, value in vars(look).items()})
        self.look = look
        self.canvas = np.empty((BLOCK_SIZE, size, size, 3), np.float32)

        self.pixel = 2 / size
        axis = (np.arange(size, dtype=np.float32) + 0.5) * self.pixel - 1
        self.page_x = axis[None, None, :]
        self.page_y = axis[None, :, None]
        x = (self.page_x - look.x) / look.zoom
        y = (self.page_y - look.y - 0.04) / look.zoom
        cos, sin = np.cos(look.tilt), np.sin(look.tilt)
        self.x = cos * x + sin * y
        self.y = cos * y - sin * x
        self.turned_x = self.x - look.turn

        self.skin = skin_colour(look.skin, self.has['Pale_Skin']) + look.skin_hue
        self.hair = self.hair_colour()
        self.visible_hair = 1 - self.has['Bald']
        self.head_x, self.head_y, self.head_radius = self.head_outline()
        self.on_head = self.coverage((self.head_radius - 1) * 0.5)

    def draw(self) -> Array:
        """Paint the faces from back to front; return them as (BLOCK_SIZE, 3, size, size) uint8."""
        self.draw_background()
        self.draw_hair_behind()
        self.draw_shoulders()
        self.draw_ears()
        self.draw_head()
        self.draw_earrings()
        for side in (-1, 1):
            self.draw_eye(side)
            self.draw_eyebrow(side)
        self.draw_nose()
        self.draw_mouth()
        self.draw_beard()
        self.draw_hair_in_front()
        self.draw_glasses()
        self.draw_hat()

        values = (self.canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)
        return values.transpose(0, 3, 1, 2)

    def coverage(self, distance: Array, soft: float = 1.0) -> Array:
        """Turn signed distances into coverage between 0 and 1, with an edge of ``soft`` pixels."""
        return (0.5 - distance / (self.pixel * soft)).clip(0, 1)

    def paint(self, mask: Array, colour: Number) -> None:
        """Blend a colour, which broadcasts to (..., 3), into the canvas where the mask is not 0."""
        self.canvas += mask[..., None] * (colour - self.canvas)

    def paint_shaded(self, mask: Array, colour: Array, shade: Array) -> None:
        """Paint a colour multiplied by a brightness that varies from pixel to pixel."""
        self.paint(mask, colour * shade[..., None])

    # ----------------------------------------------------------------------- properties of the head

    def hair_colour(self) -> Array:
        """Return the colour of the hair, black where there is none."""
        colour = np.zeros((BLOCK_SIZE, 1, 1, 3), np.float32)
        for name, value in HAIR_COLOURS.items():
            colour = colour + self.has[name][..., None] * value
        return colour + self.look.hair_tone * (0.4 + colour)

    def facial_hair_colour(self, without_hair: float) -> Array:
        """Return the colour of the hair, or a grey for bald heads."""
        return np.where(self.visible_hair[..., None] > 0, self.hair, without_hair)

    def hair_waves(self) -> Array:
        """Return how far the outline of the hair bulges."""
        wave = np.sin(13 * self.y + self.look.wave)
        return 0.05 * self.has['Wavy_Hair'] * wave - 0.01

    def head_outline(self) -> tuple[Array, Array, Array]:
        """Return coordinates in units of the head's radii, and the radius, which is 1 at its edge.

        The head is an ellipse whose lower half is squared by the jaw.
        """
        has = self.has
        radius_x = 0.475 + 0.05 * has['Chubby'] - 0.035 * has['Oval_Face']
        chin = 0.60 + 0.05 * has['Oval_Face'] + 0.02 * has['Male']
        radius_y = np.where(self.y > 0, chin, 0.62)
        squareness = 0.5 * has['Male'] + 0.7 * has['Chubby']
        squareness = squareness - 0.2 * has['Oval_Face'] + 4 * self.look.jaw
        power = np.where(self.y > 0, 2 + squareness, 2)

        x = self.x / radius_x
        y = self.y / radius_y
        return x, y, power_norm(x, y, power)

    # ------------------------------------------------------------------------------ behind the head

    def draw_background(self) -> None:
        tilt = self.look.background_tilt
        shade = tilt[..., 0] * self.page_x + tilt[..., 1] * self.page_y
        shade = shade - 0.12 * (self.page_x**2 + self.page_y**2)
        self.canvas[:] = self.look.background + shade[..., None]

    def draw_hair_behind(self) -> None:
        """Draw women's hair down to the shoulders or below, men's down to the ears."""
        has, look, x, y = self.has, self.look, self.x, self.y
        male = has['Male'] > 0
        bottom_of_men = 0.1 * look.hair_length
        bottom_of_women = 0.42 + 0.5 * look.hair_length
        bottom = np.where(male, bottom_of_men, bottom_of_women)
        width = 0.60 + 0.07 * has['Wavy_Hair'] + np.where(male, -0.045, 0.0)

        above = np.minimum(y + 0.12, 0)
        outline = ellipse(x, above, width, 0.72) + self.hair_waves()
        mask = self.coverage(outline * 0.6) * self.coverage(y - bottom, 3)
        shade = 0.80 + 0.12 * np.cos(9 * x + look.wave)
        self.paint_shaded(mask * self.visible_hair, self.hair, shade)

    def draw_shoulders(self) -> None:
        has, look = self.has, self.look
        x = self.page_x - look.x * 0.6
        y = self.page_y - look.y * 0.5
        width = np.where(has['Male'] > 0, 0.98, 0.84) + 0.06 * has['Chubby']
        height = np.abs((y - 1.25) / 0.58).clip(0, 9)
        body = (np.abs(x / width) ** 2.6 + height**2.6) - 1
        fold = 0.9 + 0.15 * x * look.light - 0.25 * (y - 0.8)
        self.paint_shaded(self.coverage(body * 0.4), look.clothes, fold)

        self.draw_neck(x, y)
        self.draw_necktie(x, y)
        self.draw_necklace(x, y)

    def draw_neck(self, x: Array, y: Array) -> None:
        half_width = np.where(self.has['Male'] > 0, 0.24, 0.19)
        half_width = half_width + 0.03 * self.has['Chubby']
        slope = 0.5 * (y - 0.62).clip(0, 1) ** 2
        sides = np.abs(x) - half_width - slope
        ends = np.abs(y - 0.55) - 0.25 + 0.5 * np.abs(x)
        shadow = 0.62 + 0.5 * (y - 0.55).clip(0, 0.5)
        self.paint_shaded(self.coverage(np.maximum(sides, ends)), self.skin, shadow)

    def draw_necktie(self, x: Array, y: Array) -> None:
        collar = rectangle(np.abs(x) - 0.14, y - 0.76, 0.10, 0.07)
        knot_sides = np.abs(x) - 0.07 - 0.12 * (y - 0.72).clip(0, 1)
        knot = np.maximum(knot_sides, 0.70 - y)
        worn = self.has['Wearing_Necktie']
        self.paint(self.coverage(collar) * worn, COLLAR)
        self.paint(self.coverage(knot) * worn, self.look.accent)

    def draw_necklace(self, x: Array, y: Array) -> None:
        ring = np.abs(circle(x, (y - 0.56) * 1.1, 0.30)) - 0.028
        chain = np.maximum(ring, 0.60 - y)
        self.paint(self.coverage(chain) * self.has['Wearing_Necklace'], NECKLACE)

    # ------------------------------------------------------------------------------------- the head

    def draw_ears(self) -> None:
        for side in (-1, 1):
            x = self.x - side * 0.50 + 0.3 * self.look.turn
            ear = ellipse(x, self.y - 0.06, 0.09, 0.14)
            self.paint(self.coverage(ear * 0.1), self.skin * 0.82)

    def draw_head(self) -> None:
        has, look, x, y = self.has, self.look, self.x, self.y
        height = np.sqrt((1 - self.head_radius**2).clip(0.02, 1))  # of a round surface
        from_the_side = 0.17 * look.light * self.head_x * (1.2 - height)
        from_above = 0.10 * look.light_up * self.head_y
        light = 0.66 + 0.34 * height + from_the_side - from_above

        left_cheek = spot(self.turned_x + 0.27, y - 0.20, 0.15, 0.10)
        right_cheek = spot(self.turned_x - 0.27, y - 0.20, 0.15, 0.10)
        cheeks = left_cheek + right_cheek
        light = light + 0.10 * cheeks * (has['High_Cheekbones'] + 0.5 * has['Smiling'])
        fold_of_chin = spot(x, y + 0.5 * x**2 - 0.50, 0.22, 0.03)
        light = light - 0.25 * has['Double_Chin'] * fold_of_chin
        light = self.darken_wrinkles(light)

        self.paint_shaded(self.on_head, self.skin, light)
        rosy = cheeks.clip(0, 1) * has['Rosy_Cheeks'] * self.on_head
        self.paint(0.65 * rosy, BLUSH)

    def darken_wrinkles(self, light: Array) -> Array:
        """Return the light on the head less the wrinkles of old faces."""
        old = 1 - self.has['Young']
        x, y = self.turned_x, self.y
        for side in (-1, 1):  # from the nose to the corners of the mouth
            distance = np.abs(x - side * (0.13 + 0.30 * (y - 0.15))) / 0.03
            extent = self.coverage(np.abs(y - 0.27) - 0.10, 2)
            light = light - 0.16 * old * np.exp(-(distance**2)) * extent
        for line_y in (-0.36, -0.27):  # across the forehead
            distance = (y - line_y) / 0.022
            extent = self.coverage(np.abs(x) - 0.2, 3)
            light = light - 0.13 * old * np.exp(-(distance**2)) * extent
        return light

    def draw_earrings(self) -> None:
        for side in (-1, 1):
            x = self.x - side * 0.53 + 0.3 * self.look.turn
            earring = circle(x, self.y - 0.27, 0.062)
            self.paint(self.coverage(earring) * self.has['Wearing_Earrings'], EARRING)

    # --------------------------------------------------------------------------------- the features

    def eye_x(self, side: int) -> Array:
        """Return the x coordinate relative to the middle of the left (-1) or right (1) eye."""
        return self.turned_x - side * (0.205 + self.look.eye_gap)

    def draw_eye(self, side: int) -> None:
        has, look, y = self.has, self.look, self.y
        x = self.eye_x(side)
        bags = spot(x, y - 0.115, 0.10, 0.04) * has['Bags_Under_Eyes']
        self.paint(0.45 * bags, self.skin * BAGS_TINT)
        socket = spot(x, y + 0.055, 0.15, 0.075)
        self.paint(0.22 * socket * self.on_head, self.skin * 0.45)
        makeup = spot(x - 0.01 * side, y + 0.075, 0.125, 0.06) * has['Heavy_Makeup']
        self.paint(0.85 * makeup, 0.35 * look.accent + EYE_SHADOW)

        half_height = 0.070 * (1 - 0.5 * has['Narrow_Eyes']) * (1 - 0.10 * has['Smiling'])
        lid = ellipse(x, y + 0.014, 0.135, half_height + 0.016)
        self.paint(0.8 * self.coverage(lid * 0.1), self.skin * 0.25)
        white = ellipse(x, y, 0.115, half_height)
        eye = self.coverage(white * 0.09)
        self.paint(eye, EYE_WHITE)

        looking_x = x - 0.25 * look.turn
        iris = circle(looking_x, y, 0.064)
        pupil = circle(looking_x, y, 0.034)
        self.paint(eye * self.coverage(iris), self.iris_colour())
        self.paint(eye * self.coverage(pupil), PUPIL)

    def iris_colour(self) -> Array:
        eye = self.look.eye
        red = 0.14 + 0.25 * eye
        green = 0.12 + 0.33 * eye
        blue = 0.10 + 0.55 * eye**1.5
        return np.stack([red, green, blue], axis=-1)

    def draw_eyebrow(self, side: int) -> None:
        has, x = self.has, self.eye_x(side)
        middle = -0.165 - 0.03 * has['Arched_Eyebrows'] + 0.02 * has['Male']
        arch = (1.5 + 5 * has['Arched_Eyebrows']) * (x - 0.02 * side) ** 2
        slope = 0.06 * side * x
        y = self.y - (middle + arch - slope)
        half_thickness = 0.020 + 0.012 * has['Male'] + 0.026 * has['Bushy_Eyebrows']
        brow = rectangle(x, y, 0.135, half_thickness)
        self.paint(0.9 * self.coverage(brow), self.facial_hair_colour(0.25) * 0.6 + 0.02)

    def draw_nose(self) -> None:
        has, look, y = self.has, self.look, self.y
        x = self.turned_x - 0.4 * look.turn
        width = 0.075 + 0.05 * has['Big_Nose'] - 0.02 * has['Pointy_Nose']
        tip_y = 0.235 + look.nose_length + 0.02 * has['Big_Nose']

        shadow_side = np.where(look.light > 0, -1, 1)
        bridge = spot(x - shadow_side * 0.055, y - 0.06, 0.035, 0.16)
        self.paint(0.35 * bridge, self.skin * 0.55)
        shadow = spot(x, y - (tip_y + 0.045), width * 1.15, 0.03)
        self.paint(0.45 * shadow, self.skin * 0.35)

        tip = spot(x, y - (tip_y - 0.02), width * 0.7, 0.05)
        self.paint((0.30 + 0.2 * has['Big_Nose']) * tip, self.skin * 1.15 + 0.08)
        ridge = spot(x, y - (tip_y - 0.08), 0.03, 0.15)
        self.paint(0.55 * has['Pointy_Nose'] * ridge, self.skin * 1.2 + 0.15)
        for side in (-1, 1):
            nostril = spot(x - side * width * 0.6, y - (tip_y + 0.03), 0.03, 0.02)
            self.paint(0.6 * nostril, self.skin * 0.25)

    def draw_mouth(self) -> None:
        has, x = self.has, self.turned_x
        smiling, is_open = has['Smiling'], has['Mouth_Slightly_Open']
        half_width = 0.165 + 0.05 * smiling + 0.01 * has['Male']
        smile = 0.045 - 2.3 * x**2
        serious = 0.012 - 0.6 * x**2
        curve = smiling * smile - (1 - smiling) * serious
        y = self.y - 0.395 - self.look.mouth_y - curve

        taper = (1 - (x / half_width) ** 2).clip(0, 1)
        lips = (0.032 + 0.026 * has['Big_Lips']) * np.sqrt(taper)
        gap = (0.048 + 0.012 * smiling) * is_open * taper
        between_corners = self.coverage(np.abs(x) - half_width)
        lips_mask = self.coverage(np.abs(y) - lips - gap)
        self.paint(lips_mask * between_corners, self.lip_colour())
        gap_mask = self.coverage(np.abs(y) - np.maximum(gap, 0.008))
        self.paint(gap_mask * between_corners, MOUTH_INSIDE)
        teeth = rectangle(x, y + 0.3 * gap, 0.80 * half_width, 0.6 * gap)
        self.paint(self.coverage(teeth) * is_open, TEETH)

    def lip_colour(self) -> Array:
        natural = self.skin * LIP_TINT
        painted = LIPSTICK * (0.75 + 0.4 * self.look.tint[..., None])
        return natural + self.has['Wearing_Lipstick'][..., None] * (painted - natural)

    def draw_beard(self) -> None:
        has, x, y = self.has, self.turned_x, self.y
        lower_face = self.coverage(0.22 - y, 6) * self.on_head
        mouth = self.coverage(ellipse(x, y - 0.40, 0.20, 0.085), 8)
        stubble = 0.38 * lower_face * (1 - mouth) * has['5_o_Clock_Shadow']
        self.paint(stubble, self.skin * 0.35 + 0.03)

        colour = self.facial_hair_colour(0.2) * 0.75
        wing_y = 0.315 + 0.9 * x**2
        half_thickness = 0.038 * (1 - (x / 0.26) ** 2).clip(0.2, 1)
        moustache = rectangle(x, y - wing_y, 0.21, half_thickness)
        self.paint(0.93 * self.coverage(moustache) * has['Mustache'], colour)
        goatee = ellipse(x, y - 0.575, 0.155, 0.115)
        self.paint(0.93 * self.coverage(goatee * 0.12, 1.3) * has['Goatee'], colour)

    # -------------------------------------------------------------------------------- over the head

    def draw_hair_in_front(self) -> None:
        has, x, y = self.has, self.x, self.y
        width = 0.545 + 0.03 * has['Wavy_Hair']
        outline = ellipse(x, y + 0.03, width, 0.70) + self.hair_waves()
        cap = np.maximum(outline * 0.6, y - self.hairline())
        beside_face = np.maximum(outline * 0.6, 0.43 - np.abs(x))
        temple_ends = np.abs(y + 0.10) - 0.20 - 0.30 * (1 - has['Male'])
        temples = np.maximum(beside_face, temple_ends)
        sideburns = rectangle(np.abs(x) - 0.425, y - 0.12, 0.055, 0.17)

        shadow = 0.25 * spot(x, y + 0.33, 0.40, 0.10)
        self.paint(shadow * self.on_head * self.visible_hair, self.skin * 0.4)
        colour = self.shiny_hair_colour()
        self.paint(self.coverage(cap, 1.3) * self.visible_hair, colour)
        self.paint(self.coverage(temples, 1.3) * self.visible_hair, colour)
        self.paint(self.coverage(sideburns, 1.3) * has['Sideburns'], colour)

    def hairline(self) -> Array:
        """Return the y coordinate below which the forehead is free of hair."""
        has, look, x = self.has, self.look, self.x
        receding = has['Receding_Hairline']
        part_distance = x - 0.5 * look.part

        middle = -0.34 - 0.5 * (0.30 * receding)
        widow_peak = 0.5 * (x - look.part) ** 2 * receding
        temples = (1.0 - 0.9 * receding) * part_distance**2 * 1.6
        line = middle - widow_peak + temples
        strands = 0.02 * np.sin(30 * x + look.wave)
        fringe = -0.155 + 0.25 * part_distance**2 + strands
        return line + has['Bangs'] * (fringe - line)

    def shiny_hair_colour(self) -> Array:
        """Return the colour of the hair with its strands and the reflected light."""
        look, x, y = self.look, self.x, self.y
        shine = 0.85 + 0.30 * spot(x - 0.3 * look.light, y + 0.50, 0.30, 0.10)
        wave = 6 * self.has['Wavy_Hair'] * np.sin(9 * y)
        shine = shine + 0.08 * np.sin(22 * x + wave + look.wave)
        return self.hair * shine[..., None] + 0.05 * (shine - 0.85)[..., None]

    def draw_glasses(self) -> None:
        look, x, y = self.look, self.turned_x, self.y
        coloured = look.tint[..., None] > 0.5
        frame = GLASSES_FRAME + 0.25 * look.accent * coloured
        opacity = 0.72 * (look.tint > 0.75)
        worn = self.has['Eyeglasses']
        for side in (-1, 1):
            lens_x = (x - side * 0.215) / 0.175
            lens_y = (y - 0.01) / 0.135
            lens = power_norm(lens_x, lens_y, 3) - 1
            self.paint(self.coverage(lens * 0.14) * worn * opacity, frame)
            self.paint(self.coverage(np.abs(lens) * 0.14 - 0.024) * worn, frame)
        bridge = rectangle(x, y + 0.02, 0.045, 0.02)
        arms = rectangle(np.abs(self.x) - 0.43, y + 0.03, 0.06, 0.02)
        self.paint(self.coverage(np.minimum(bridge, arms)) * worn, frame)

    def draw_hat(self) -> None:
        look, x, y = self.look, self.x, self.y
        crown_bottom = (y + 0.38 - 0.10 * x**2) / 0.62
        crown = np.maximum(ellipse(x, y + 0.30, 0.57, 0.62), crown_bottom)
        brim = rectangle(x, y + 0.36 - 0.12 * x**2, 0.64, 0.05)
        shade = 0.85 + 0.25 * spot(x - 0.4 * look.light, y + 0.65, 0.3, 0.25)
        worn = self.has['Wearing_Hat']

        shadow = 0.35 * worn * spot(x, y + 0.24, 0.45, 0.08)
        self.paint(shadow * self.on_head, self.skin * 0.3)
        self.paint_shaded(self.coverage(crown * 0.5) * worn, look.hat, shade)
        self.paint(self.coverage(brim) * worn, look.hat * 0.7)


def with_pixel_axes(value: Array) -> Array:
    """Reshape (BLOCK_SIZE, ...) to (BLOCK_SIZE, 1, 1, ...), to broadcast over the pixels."""
    return value.reshape(BLOCK_SIZE, 1, 1, *value.shape[1:])


def skin_colour(tone: Array, pale: Array) -> Array:
    """Return the colour (B, 1, 1, 3) of a skin.

    Arguments:
        tone: From 0, dark, to 1, light; (B, 1, 1).
        pale: 1 where the skin is pale, else 0; (B, 1, 1).
    """
    positions = range(len(SKIN_COLOURS))
    position = tone * (len(SKIN_COLOURS) - 1)
    channels = [np.interp(position, positions, values) for values in zip(*SKIN_COLOURS)]
    colour = np.stack(channels, axis=-1).astype(np.float32)
    return colour + pale[..., None] * (PALE_SKIN - colour)
