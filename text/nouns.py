"""Nouns in captions that name the objects of detectors, COCO's categories."""

# In the order of their ids, from 1; ids that COCO does not use are empty.
COCO_CATEGORIES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, , "
    "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, , "
    "backpack, umbrella, , , handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, "
    "baseball glove, skateboard, surfboard, tennis racket, bottle, , wine glass, cup, fork, knife, spoon, bowl, "
    "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, "
    "bed, , dining table, , , toilet, , tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, "
    "toaster, sink, refrigerator, , book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
# Categories whose nouns differ from their last word, or that have none: in captions "orange" is a color.
NOUNS = {
    "person": (
        "person man woman boy girl child kid baby toddler guy lady gentleman player rider skier skateboarder "
        "snowboarder surfer biker cyclist bicyclist motorcyclist climber hiker runner racer swimmer dancer athlete "
        "teenager adult"
    ),
    "bicycle": "bicycle bike",
    "car": "car suv taxi",
    "motorcycle": "motorcycle motorbike bike",
    "airplane": "airplane plane jet",
    "truck": "truck pickup",
    "boat": "boat kayak canoe raft sailboat",
    "traffic light": "",
    "bird": "bird duck goose seagull pigeon",
    "cat": "cat kitten",
    "dog": "dog puppy greyhound",
    "horse": "horse pony",
    "sheep": "sheep lamb",
    "cow": "cow bull calf",
    "backpack": "backpack bag",
    "handbag": "handbag bag purse",
    "suitcase": "suitcase bag",
    "skis": "ski",
    "snowboard": "snowboard board",
    "sports ball": "ball football basketball volleyball",
    "skateboard": "skateboard board",
    "surfboard": "surfboard board",
    "wine glass": "wineglass",
    "orange": "",
    "hot dog": "hotdog",
    "couch": "couch sofa",
    "tv": "tv television",
    "remote": "",
    "cell phone": "phone cellphone",
    "teddy bear": "teddy",
}
IRREGULAR_PLURALS = {
    "man": "men",
    "woman": "women",
    "gentleman": "gentlemen",
    "child": "children",
    "person": "people",
    "goose": "geese",
    "mouse": "mice",
    "sheep": "sheep",
    "scissors": "scissors",
    "calf": "calves",
    "knife": "knives",
}


def nouns_of(words: list[str]) -> set[str]:
    """Return the nouns that name an object with these words: those in NOUNS, otherwise its last word; and plurals."""
    singular = NOUNS.get(" ".join(words), words[-1]).split()
    return {*singular, *map(plural, singular)}


def plural(noun: str) -> str:
    """Return the plural of a noun."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "sh", "ch", "x")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in ("", *"aeiou"):
        return f"{noun[:-1]}ies"
    return f"{noun}s"
