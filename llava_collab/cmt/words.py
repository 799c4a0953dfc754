"""Words that are drawn: on signs, and as goods on receipts (short, so that they are legible at 224 pixels)."""

from __future__ import annotations

from typing import Final

SIGN_WORDS: Final = tuple(
    "STOP EXIT OPEN CLOSED TAXI BUS HOTEL BANK CAFE BAKERY MUSEUM SCHOOL LIBRARY PARK POLICE FIRE DANGER PRIVATE PUSH PULL ENTRY "
    "TOILETS TICKETS PARKING STATION AIRPORT FERRY BEACH BRIDGE TUNNEL MARKET FLOWERS BOOKS SHOES PIZZA COFFEE TEA BREAD FRUIT ICE "
    "FISH MEAT MILK SALE RENT FREE FULL EMPTY LEFT RIGHT NORTH SOUTH EAST WEST UP DOWN SLOW WAIT WALK QUIET POOL GYM CINEMA THEATRE "
    "GARDEN FARM FOREST LAKE RIVER HARBOUR TOWER CASTLE CHURCH OFFICE LIFT STAIRS INFO HELP DOCTOR DENTIST PHARMACY BARBER TAILOR".split()
)
GOODS: Final = tuple(
    "apple banana bread butter cheese milk egg rice pasta flour sugar salt tea coffee juice water honey jam yogurt cereal soap cake "
    "shampoo towel candle battery lamp pen pencil paper stamp book map ticket belt shirt hat scarf umbrella flower vase rope comb "
    "nail paint brush glue tape cup plate bowl spoon knife fork tomato onion carrot potato lemon pear melon garlic olive oil pie".split()
)
