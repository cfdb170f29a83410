"""Nouns of captions for the objects that detectors find: the categories of COCO.

A category is named by the last of its words, and by these nouns; all of them may be plural.
"""

NOUNS = {
    "person": (
        "man woman boy girl child kid baby toddler guy lady gentleman player rider skier skateboarder snowboarder "
        "surfer biker cyclist bicyclist motorcyclist climber hiker runner racer swimmer dancer athlete teenager adult"
    ),
    "dog": "puppy greyhound",
    "cat": "kitten",
    "horse": "pony",
    "cow": "bull calf",
    "sheep": "lamb",
    "bird": "duck goose seagull pigeon",
    "bicycle": "bike",
    "motorcycle": "motorbike bike",
    "car": "suv taxi",
    "truck": "pickup",
    "boat": "kayak canoe raft sailboat",
    "sports ball": "football basketball soccerball volleyball",
    "cell phone": "cellphone",
    "couch": "sofa",
    "tv": "television",
    "handbag": "bag purse",
    "suitcase": "bag",
    "backpack": "bag",
    "surfboard": "board",
    "snowboard": "board",
}
IRREGULAR_PLURALS = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "baby": "babies",
    "lady": "ladies",
    "gentleman": "gentlemen",
    "puppy": "puppies",
    "pony": "ponies",
    "calf": "calves",
    "goose": "geese",
    "person": "people",
    "sheep": "sheep",
    "bus": "buses",
    "bench": "benches",
    "couch": "couches",
    "skis": "ski",
    "knife": "knives",
    "sandwich": "sandwiches",
}


def nouns_of(words: list[str]) -> set[str]:
    """The nouns that name an object of these words, singular and plural: its last word, and those of its category."""
    nouns = {words[-1], *NOUNS.get(" ".join(words), "").split()}
    return nouns | {IRREGULAR_PLURALS.get(noun, f"{noun}s") for noun in nouns}
