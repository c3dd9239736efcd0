"""What task generators draw keys and lists from: everyday English words, and UUIDs."""

from __future__ import annotations

import random
from functools import cache

ADJECTIVES = """
able amber ancient arctic autumn bashful bitter blunt bold brave breezy bright brisk broad careful
casual cheerful chilly civil clever coastal cosmic crimson crisp curious curly daring distant dusty
eager early elegant faint famous fancy fierce floral foggy formal fragile frosty gentle giant gifted
glossy golden graceful grand grateful handsome hasty hidden hollow honest humble hungry icy idle
jolly keen lively lonely lucky lunar mellow mighty misty modest muddy narrow nimble noble northern
odd orderly pale patient plain playful polite proud quaint quick rapid rare restless rosy royal
rustic sandy secret silent silver sleepy slender smoky snowy solar southern spare steady stormy
stout sturdy sunny swift tame tender tidy timid tiny vast velvet vivid wandering wary wild windy
winter wise witty wooden young
"""
NOUNS = """
acorn anchor anvil apron arrow badge balcony bamboo banner barley barrel basin beacon beetle bell
bench blanket blossom bonfire bottle boulder bracelet bridge bucket butter button cabin cable cactus
canal candle canvas caravan carpet castle cave cedar chapel cherry chimney cinnamon cliff clock
cloud cobbler comet compass copper coral cottage cradle crater cricket crown crystal cushion dagger
desert dolphin donkey dragon drum eagle elbow ember engine envelope falcon feather fence fiddle
finger flute forest fountain galaxy garlic glacier goblet granite guitar hammer harbor harvest hazel
helmet heron hinge honey island ivory jacket jungle kettle kingdom kitten ladder lagoon lantern
lemon leopard lighthouse lizard magnet mango maple marble meadow melon mirror monsoon mountain
muffin mushroom napkin needle nutmeg oasis ocean olive orchard otter oyster paddle palace panda
parrot pebble pelican pepper piano pillow pirate planet pocket pony potato prairie puddle pumpkin
puzzle rabbit raccoon radish rainbow raven reef ribbon river rocket saddle salmon sandal satchel
shadow shelter shovel signal socket spider spoon squirrel statue sunset tailor teapot temple thimble
thunder tiger timber tractor trumpet tunnel turtle umbrella valley vessel village violin volcano
wagon walnut walrus waterfall whisker willow window wizard yogurt zebra zipper
"""
VERBS = """
admire answer arrange arrive balance bake bargain borrow bounce build carry carve celebrate chase
choose climb collect compare cook copy count cover cross dance decide deliver describe dig discover
divide drift enter escape explore fasten fetch follow forgive gather glide greet guess hike imagine
improve invent invite juggle jump knock laugh launch learn listen measure mend notice obey observe
offer paint plant polish practice prepare promise protect pull push reach remember repair rescue
return ride row sail scatter search share shout sing sketch skip solve sort splash stretch swim tie
travel twist visit wait walk wander wash weave whisper wonder wrap write
"""


@cache
def compounds() -> tuple[str, ...]:
    """Every adjective-noun pair, such as `brave-lantern`, in a fixed order."""
    return tuple(
        f"{adjective}-{noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()
    )


@cache
def single_words() -> tuple[str, ...]:
    """Every word of the lists once, in a fixed order."""
    return tuple(sorted({*ADJECTIVES.split(), *NOUNS.split(), *VERBS.split()}))


def random_uuid(rng: random.Random) -> str:
    """A UUID of version 4."""
    # Not `uuid.UUID`, which takes long to write out hundreds of thousands of these.
    digits = f"{rng.getrandbits(128):032x}"
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
