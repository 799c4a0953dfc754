"""What the pictures show: a hand-checked list of the Tux Paint photo cutouts and background photographs that CMT-open uses.

Every stamp was looked at: drawings, jokes, plurals and barely visible pictures are left out, and captions are shortened to a noun of
one to three words ("A Magellanic penguin." -> penguin). Backgrounds with a countable thing in them (dogs, a fig, a clock) are out too,
so that "is there a dog?" has one truth.
"""

from __future__ import annotations

from typing import Final

# group -> {folder below stamps/: "stem stem=name ..."}; an underscore in a name stands for a space.
_STAMPS: Final[dict[str, dict[str, str]]] = {
    "animal": {
        "animals/amphibians": "frog-1=frog frog",
        "animals/birds": "adelaide-rosella=parrot rainbow-lorikeet=parrot blackbird chicken_profile=chicken hen=chicken crow "
        "crowned_crane=crane cuckoo drake=duck duck gander=goose guineafowl=guinea_fowl helmeted_guineafowl=guinea_fowl "
        "heron_greatblue=heron heron_greatblue_flying=heron lark little-penguin=penguin magellanic_penguin=penguin penguin magpie "
        "nandou=rhea ostrich owl peacock pelican pigeon pink_flamingo=flamingo quetzal rooster seagull silver-gull=seagull "
        "tucan=toucan turkey vulture",
        "animals/fish": "bluegroper=fish butterflyfish=fish clownfish=fish coraltrout=fish dolphinfish=fish moonwrasse=fish "
        "stripedfish=fish lionfish lobster seahorse",
        "animals/insects": "Brown_slug=slug Woodlouse=woodlouse bee fly grasshopper hornet mantis xanthia=moth",
        "animals/lizards": "iguana",
        "animals/mammals": "badger elephant ferret giraffe hippopotamus pig pig_golden=pig pig_golden2=pig "
        "rabbit_little=rabbit rhino_black=rhino",
        "animals/mammals/apes": "chimp=chimpanzee gorilla",
        "animals/mammals/aquatic": "dolphin orca otter sea_lion=sea_lion whale",
        "animals/mammals/bears": "bear european-bear=bear",
        "animals/mammals/bovines": "bison bull cow cow_white=cow gnu-sitting=gnu gnu-stand=gnu goat indian_blackbuck=antelope "
        "ram=sheep sheep yak zebu",
        "animals/mammals/camel": "camel dromedary=camel",
        "animals/mammals/cats": "lion-2=lion lion tiger tiger_sumatran=tiger",
        "animals/mammals/deer": "caribou=deer deer doe=deer wapiti=deer",
        "animals/mammals/dogs": "dog fox",
        "animals/mammals/equines": "donkey donkey_eating=donkey horse zebra",
        "animals/mammals/rodents": "beaver capybara marmot mouse rabbit-2=rabbit rabbit rat squirrel",
        "animals/marsupials": "kangaroo koala wombat",
        "animals/shellfish": "abalone=shell murray-mussel=shell",
    },
    "food": {
        "food/fruit": "Apricot_whole=apricot apricot Strawberry2=strawberry strawberry apple_fuji=apple apple_granny_smith=apple "
        "apple_green=apple apple_red=apple apple_sierra_beauty=apple avocado banana cherimoya grapes=bunch_of_grapes kiwi lemon "
        "mandarine=orange mango orange orange_seville=orange pear pineapple pomegranate raspberry sliced_lime=lime",
        "food/nuts": "almond pecan walnut",
        "food/vegetables": "broccoli carrot chilepepper=chili_pepper eggplant garlic=garlic_bulb lettuce redlettuce=lettuce mushroom "
        "onion pepper yellowpepper=pepper potato pumpkin_small=pumpkin tomato yam",
        "plants/mushrooms": "cep-1=mushroom cep=mushroom",
        "seasonal/christmas": "Mince_Pie=pie",
    },
    "plant": {
        "plants/flowers": "anemone_red=anemone daffodil flower10=hibiscus iris marigold red-gazania=gazania rose whitestar-petunia=petunia",
        "plants/trees": "birch=tree holm_oak=tree tree336=tree liberia-palm=palm_tree pinecone",
        "seasonal/christmas": "Christmas_Tree_photo=christmas_tree",
    },
    "vehicle": {
        "vehicles": "garbagetruck=garbage_truck",
        "vehicles/auto": "beetle=car sedan=car sportscar2=car truck=pickup_truck",
        "vehicles/construction": "dumper",
        "vehicles/cycle": "pink_tricycle=tricycle",
        "vehicles/emergency": "firetruck=fire_truck",
        "vehicles/flight": "balloon360=hot_air_balloon",
        "vehicles/flight/planes": "747=airplane",
        "vehicles/masstransit": "green_korean_bus=bus",
        "vehicles/race": "indycar=race_car",
        "vehicles/ship": "chineseJunk=sailboat walnutBoat=sailboat",
        "military/vehicles": "f22_raptor=jet",
    },
    "tool": {
        "household/tools": "hammer mallet_metal=mallet paintbrush_large=paintbrush plyers=pair_of_pliers saw spade toolbox wrench "
        "wrench_adjustable=wrench wrench_plumbers=wrench",
        "household/arttools": "scissors_small_closed=pair_of_scissors scissors_small_open=pair_of_scissors",
        "household/dishes/utensils": "nutcracker",
    },
    "instrument": {
        "hobbies/music/brass": "trumpet",
        "hobbies/music/percussion": "cymbal_crash=cymbal drum_tomtom_floor=drum drumkit=drum_kit",
        "hobbies/music/string": "cello guitar2=guitar guitar_classical=guitar guitar_electric=guitar guitar_electric_bass=guitar violin",
        "hobbies/music/wind": "bassoon",
    },
    "other": {
        "clothes": "clothespin_new=clothespin clothespin_old=clothespin",
        "hobbies": "binoculars=pair_of_binoculars camera_35mm=camera",
        "household": "Lightbulb=light_bulb cylinder=gas_cylinder garbagecan=garbage_can wheelie_bin=garbage_can kettle key "
        "rubberduck=rubber_duck toilet",
        "household/arttools": "highlighter=marker pen_dryerase=marker",
        "household/dishes": "mug pitcher_small=pitcher teapot",
        "household/dishes/utensils": "pepper_grinder",
        "medical": "bandage_adhesive=bandage mercurythermometer=thermometer stethoscope syringe",
        "seasonal": "candle",
        "seasonal/christmas": "xmaswreath=wreath",
        "seasonal/halloween": "grave-a=gravestone grave-b=gravestone grave-d=gravestone grave-e=gravestone grave-j=gravestone",
        "sports": "basketball cricketball=cricket_ball football soccer=soccer_ball tennis_ball tennis_racket trophy_cup=trophy",
        "town": "usps_mailbox=mailbox",
        "town/roadsigns": "traffic_cone",
    },
}

# Names that could both be right for one picture: never asked against each other, and known or unseen together.
_SENSES: Final = (
    "chicken rooster",
    "duck goose rubber_duck",
    "crow blackbird",
    "heron crane",
    "ostrich rhea",
    "bull cow zebu yak bison",
    "mouse rat",
    "dolphin orca whale",
    "bee hornet fly",
    "fish lionfish seahorse",
    "hammer mallet",
    "pickup_truck fire_truck garbage_truck dumper",
    "car race_car",
    "airplane jet",
    "tree palm_tree christmas_tree",
    "drum drum_kit",
    "pepper chili_pepper",
    "pecan walnut",
    "football soccer_ball",
    "kettle teapot pitcher",
    "cello violin",
    "otter sea_lion ferret",
)

# Background photograph -> the place a story may call it, or "" where no single word fits.
BACKGROUNDS: Final[dict[str, str]] = {
    **dict.fromkeys(("mossy_log", "redwoods_above", "sun_behind_leaves", "trees_above", "trees_at_dusk"), "forest"),
    **dict.fromkeys(("life_by_Aitzol_Berasategi", "Dragonfly_by_Bolly"), "forest"),
    **dict.fromkeys(("ocean_splash", "ocean_waves"), "sea"),
    **dict.fromkeys(("rocks", "mudstone"), "rocks"),
    **dict.fromkeys(("cliff", "aitzgorri_by_Aitzol_Berasategi", "picosdeeuropa_by_Aitzol_Berasategi"), "mountains"),
    **dict.fromkeys(("GreenMeadow", "Blinds", "RainDrops", "corn_maze", "Dune", "seeding_by_Clements_Engelhardt"), "grass"),
    **dict.fromkeys(("sun_behind_clouds", "Bridge_by_Sander_Klootwijk", "sunset_by_Aitzol_Berasategi", "Storm"), "sky"),
    **dict.fromkeys(("burnt_bark", "mossy_bark", "spiders_web", "wool_mill_machine", "Aqua", "Wood", "TwoWings"), ""),
    **dict.fromkeys(("analogpattern_by_Peter_Nerlich", "umang_by_Abhishek_Mudgal"), ""),
}


def stamps() -> dict[str, tuple[str, str]]:
    """ "folder/stem" below the stamps folder -> (group, name)."""
    found: dict[str, tuple[str, str]] = {}
    for group, folders in _STAMPS.items():
        for folder, words in folders.items():
            for word in words.split():
                stem, _, name = word.partition("=")
                found[f"{folder}/{stem}"] = (group, (name or stem).replace("_", " "))
    return found


def sense_of(name: str) -> str:
    """The first name of the cluster that `name` belongs to, or `name` itself."""
    return _SENSE.get(name, name)


_SENSE: Final = {word.replace("_", " "): words.split()[0].replace("_", " ") for words in _SENSES for word in words.split()}
