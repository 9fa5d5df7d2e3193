"""The words and facts of the demo world; `grammar.py` says how they combine.

A table is a header and rows. A column of a row is a fact that holds in every story (the river of a town, the sound of
an animal): a language model can only know it from its weights. Which row a story is about is only in its context.
Words come most frequent first.
"""

from __future__ import annotations


def _table(text: str) -> list[dict[str, str]]:
    """Rows of a table whose first line names the columns; cells are separated by commas."""
    header, *rows = [[cell.strip() for cell in line.split(",")] for line in text.strip().splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


# Facts about people: a prime that spreads them without a pattern, and what there is.
_HABITS: dict[str, tuple[int, str]] = {
    "born": (37, "May October March June December April September January July November August February"),
    "likes": (41, "pears plums nuts cherries onions turnips lemons mushrooms figs peaches radishes dates walnuts"),
    "fears": (43, "wolves owls bears geese bees ravens mice frogs storms ghosts ladders mirrors soldiers doctors fire"),
    "plays": (47, "chess cards dice skittles marbles draughts dominoes billiards tennis bowls croquet"),
    "loves": (53, "red blue green yellow white black grey brown purple silver golden"),
}


def _habit(number: int, prime: int, words: list[str]) -> str:
    return words[number * number % prime % len(words)]


def _people(female: str, male: str) -> list[dict[str, str]]:
    """Women and men alternate, so that frequency says nothing about gender."""
    she = {"he": "she", "him": "her", "his": "her", "child": "daughter", "sibling": "sister"}
    he = {"he": "he", "him": "him", "his": "his", "child": "son", "sibling": "brother"}
    pairs = zip(female.split(), male.split(), strict=True)
    return [
        {
            "name": name,
            **pronouns,
            **{habit: _habit(number, prime, text.split()) for habit, (prime, text) in _HABITS.items()},
        }
        for number, (name, pronouns) in enumerate(one for f, m in pairs for one in ((f, she), (m, he)))
    ]


TABLES: dict[str, list[dict[str, str]]] = {
    "person": _people(
        "Anna Clara Maria Edith Sofia Helen Nora Ruth Ida Vera Judith Agnes Lena Martha Olga Flora Irene Greta Tilda"
        " Paula Dora Hanna Celia Rosa",
        "Tom Peter Martin Oscar David Hugo Simon Jacob Felix Victor Arthur Leo Edgar Konrad Samuel Walter Emil Anton"
        " Boris Gilbert Ralph Stefan Rufus Nils",
    ),
    "family": _table("""
name
Miller
Harlow
Brandt
Keller
Ashdown
Morrow
Lindqvist
Fenwick
Carver
Whitlock
Sandoval
Okafor
Renner
Tolland
"""),
    "town": _table("""
name, river, region, product, landmark, people
Arden, Wend, the north, wool, stone bridge, weavers
Milbrook, Ash, the valley, flour, old mill, millers
Port Selby, Tarn, the coast, salted fish, white lighthouse, sailors
Kestrel Hill, Lorn, the mountains, silver, ruined tower, miners
Dunmore, Black Water, the west, peat, round church, farmers
Oakham Ferry, Great Issel, the lowlands, rope, iron ferry, boatmen
Vinterby, Frost, the far north, furs, wooden palace, hunters
Salvara, Oro, the south, oranges, marble fountain, gardeners
Greyfield, Little Ash, the plains, barley, long barn, brewers
Halden, Stour, the forest, timber, covered market, carpenters
Marisol, Verde, the islands, pearls, blue harbour, divers
Thornwick, Neddle, the east, glass, clock tower, merchants
Eastmere, Mere, the lake country, reeds, floating garden, basket makers
Castle Rowe, Rowe, the border, horses, grey castle, soldiers
Pellham, Dove, the hills, cheese, market cross, shepherds
Quarrington, Slate, the high country, slate, deep quarry, masons
"""),
    "trade": _table("""
name, place, tool, ware, task, lesson
baker, bakery, wooden paddle, loaves of bread, knead the dough, good bread needs time
smith, forge, heavy hammer, iron hinges, heat the iron, hot iron will not wait
teacher, school, piece of chalk, school books, mark the papers, a question is worth more than an answer
farmer, farm, sharp plough, sacks of barley, plough the field, the rain asks nobody
doctor, surgery, silver needle, bottles of medicine, visit the sick, sleep cures more than powder
sailor, harbour, coil of rope, maps of the coast, mend the sails, the sea keeps no promises
tailor, workshop, pair of scissors, winter coats, measure the cloth, one should measure twice
gardener, greenhouse, small spade, baskets of roses, water the seedlings, roots grow in the dark
painter, studio, fine brush, painted signs, mix the colours, shadows are never black
clockmaker, clock shop, tiny screwdriver, brass clocks, wind the clocks, every wheel turns another
miller, mill, grinding stone, bags of flour, grind the corn, the wheel turns for everyone
hunter, lodge, long bow, fox skins, follow the tracks, patience fills the pot
librarian, library, paper knife, rare books, sort the shelves, a lost book is a lost voice
carpenter, timber yard, steel saw, oak tables, plane the boards, wood remembers the weather
fisherman, boathouse, wide net, barrels of herring, cast the nets, the best fish swim deep
potter, kiln house, potter's wheel, clay jugs, fire the kiln, clay follows a calm hand
judge, court house, bronze bell, sealed letters, hear the witnesses, the truth walks slowly
musician, concert hall, old violin, silver flutes, practise the scales, silence belongs to the music
shepherd, sheepfold, crooked staff, rolls of wool, count the sheep, the flock knows the way
brewer, brewery, copper kettle, casks of ale, stir the mash, a cold cellar saves a warm summer
"""),
    "animal": _table("""
name, sound, food, home, trait, enemy
dog, barked, bones, kennel, loyal, wolf
cat, purred, mice, kitchen, curious, dog
horse, neighed, oats, stable, strong, wolf
owl, hooted, voles, hollow tree, wise, marten
fox, yelped, hens, burrow, clever, wolf
goat, bleated, thistles, hillside, stubborn, lynx
goose, hissed, grass, pond, proud, fox
raven, croaked, carrion, cliff, clever, eagle
bear, growled, honey, cave, slow, hunter
frog, croaked, flies, marsh, quiet, heron
wolf, howled, deer, dark forest, hungry, hunter
donkey, brayed, hay, barn, patient, wolf
seal, roared, herring, rocky shore, playful, shark
otter, whistled, trout, river bank, playful, eagle
mouse, squeaked, crumbs, cellar, timid, cat
bee, hummed, nectar, hive, busy, bear
"""),
    "thing": _table("""
name, use, stuff
lantern, light the path, brass
letter, tell the news, paper
box, hold the coins, wood
key, open the gate, iron
basket, carry the apples, willow
coat, keep out the cold, wool
map, find the road, parchment
knife, cut the bread, steel
bell, call the village, bronze
cup, drink the tea, clay
ring, seal a promise, gold
boat, cross the water, oak
hat, keep off the rain, felt
rope, tie the horses, hemp
mirror, see the room, glass
drum, wake the soldiers, leather
chair, rest by the fire, pine
candle, read at night, wax
ladder, reach the roof, ash wood
clock, tell the hour, brass
blanket, cover the child, wool
cart, bring the harvest home, wood
book, pass the evening, paper
kettle, boil the water, copper
"""),
    "room": _table("""
name
kitchen
garden
market
church
inn
square
station
attic
cellar
bridge
harbour
orchard
courtyard
tower
meadow
"""),
}

WORDS: dict[str, list[str]] = {
    key: [word.strip() for word in text.split(",")]
    for key, text in {
        "adj": "old, small, heavy, red, broken, beautiful, blue, strange, green, new, dusty, golden,"
        " plain, black, lost, painted, cheap, white, precious, rusty, wet, narrow, tall, forgotten,"
        " silver, yellow, crooked, shiny, empty, soft",
        "mood": "happy, tired, afraid, angry, curious, proud, sad, calm, hungry, ashamed, lonely,"
        " cheerful, nervous, jealous, grateful, bored",
        "nature": "kind, quiet, honest, brave, careful, stubborn, clever, gentle, lazy, greedy, polite,"
        " restless, generous, strict, shy, merry",
        "weather": "cold, sunny, rainy, windy, grey, warm, foggy, stormy, bright, frosty, misty, mild",
        "sky": "rain fell on the roofs, the sun was shining, a cold wind blew from the river,"
        " snow covered the fields, fog hung over the water, the clouds were low and grey,"
        " the stars were very clear, thunder rolled in the distance, the air smelled of smoke,"
        " the first leaves were falling",
        "day": "Monday, Saturday, Friday, Sunday, Tuesday, Thursday, Wednesday",
        "month": "May, October, March, June, December, April, September, January, July, November, August, February",
        "season": "spring, winter, summer, autumn",
        "hour": "morning, evening, afternoon, night",
        "how": "slowly, quietly, quickly, carefully, suddenly, softly, gladly, sadly, politely, secretly,"
        " proudly, at once, with a smile, without a word, with both hands, in a hurry",
        "fruit": "apples, pears, eggs, plums, nuts, cherries, onions, turnips, lemons, mushrooms, figs, peaches",
        "coin": "pennies, crowns, shillings, florins",
        "went": "walked, went, ran, hurried, climbed, wandered, rode, rushed, strolled, crept",
        "found": "found, saw, discovered, noticed, picked up, came upon, spotted, dug up",
        "took": "took, carried, hid, held, sold, wrapped, repaired, cleaned, dropped, borrowed, opened,"
        " kept, buried, weighed",
        "said": "said, answered, whispered, cried, replied, shouted, explained, murmured, laughed, sighed",
        "asked": "asked, wondered, demanded, called",
        "felt": "felt, was, looked, seemed, became, remained",
        "kin": "uncle, mother, cousin, neighbour, aunt, father, grandmother, old friend, master, landlord",
        "reason": "the road was long, nobody had come, the shop was closed, it was getting dark,"
        " the door was open, the winter had been hard, the price was too high, the boat was late,"
        " there was no more bread, the letter had not arrived, the bells were ringing,"
        " the fire had gone out",
        "since": "ten years ago, last winter, in the year of the flood, long before the war,"
        " three summers ago, when the old king was alive, before the railway came,"
        " on the day of the great fire",
    }.items()
}

NUMBERS: list[str] = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four
""".split()  # noqa: SIM905
