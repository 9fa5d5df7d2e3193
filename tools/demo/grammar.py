"""The sentence templates of the demo text. `text.py` expands them; this is their notation.

`{hero.name}`  column `name` of the row that plays `hero` in this story: the same row all through the story
`{hero}`       the subject: the name, or the pronoun when hero was the last one spoken of
`{adj~thing}`  a word of the list `adj`, remembered for this story's `thing`; every thing has its`
        ` own favourites
`{how!}`       a new word of the list every time
`{n} {m}`      numbers with m < n - 1, and `{sum}`, `{rest}` their sum and difference
`{wish}`       a template of the rule `wish`, expanded anew every time
"""

from __future__ import annotations

# Who or what a story remembers, and the table it is drawn from. Two roles of one table never share a row.
ROLES: dict[str, str] = {
    "hero": "person",
    "friend": "person",
    "stranger": "person",
    "family": "family",
    "home": "town",
    "away": "town",
    "trade": "trade",
    "craft": "trade",
    "animal": "animal",
    "beast": "animal",
    "thing": "thing",
    "gift": "thing",
    "tool": "thing",
    "room": "room",
    "hall": "room",
}

# A story is a list of (rule, fewest sentences, most sentences).
STORIES: list[list[tuple[str, int, int]]] = [
    [("meet", 2, 3), ("walk", 2, 4), ("find", 2, 3), ("talk", 2, 4), ("back", 1, 3)],
    [("work", 3, 4), ("talk", 1, 3), ("count", 1, 1), ("walk", 1, 2), ("mood_line", 2, 3)],
    [("town_fact", 4, 6), ("meet", 1, 2), ("walk", 1, 2), ("town_fact", 1, 2)],
    [("meet", 1, 2), ("beast_fact", 2, 3), ("beast_act", 3, 4), ("mood_line", 1, 2), ("talk", 1, 2)],
    [("letter_open", 1, 1), ("letter", 4, 6), ("letter_close", 1, 1)],
    [("meet", 1, 2), ("count", 1, 1), ("trade_talk", 3, 4), ("count", 1, 1), ("back", 1, 2)],
    [("trade_fact", 2, 4), ("work", 2, 3), ("mood_line", 1, 2), ("talk", 1, 3)],
    [("diary", 4, 7), ("back", 1, 1)],
]

RULES: dict[str, list[str]] = {
    "meet": [
        "{hero.name} {family.name} was a {nature~hero} {trade.name} who lived in {home.name}, near"
        " the river {home.river}.",
        "On a {weather!} {hour!} in {month!}, {hero.name} left {home.name} with a {adj~thing} {thing.name}.",
        "{hero.name} had a {friend.sibling} called {friend.name}, and the two of them were never {mood!} for long.",
        "There was once a {trade.name} named {hero.name}, and {hero.he} owned a {adj~thing}"
        " {thing.name} made of {thing.stuff}.",
        "Everybody in {home.name} knew {hero.name}, the {trade.name} with the {adj~thing} {thing.name}.",
        "{hero.name} was the {hero.child} of a {trade.name}, but {hero.he} wanted to see"
        " {away.name} and the river {away.river}.",
        "{friend.name} {family.name} came from {away.name} in {away.region}, and {friend.he} was"
        " {nature~friend} and {mood!}.",
        "It was {day!}, and {sky!}.",
        "{hero.name} was born in {hero.born}, and nobody in {home.name} played {hero.plays} so well.",
        "{hero.name} liked {hero.likes} and feared {hero.fears}, while {friend.name} feared only {friend.fears}.",
        "For years {friend.name} had worn {friend.loves}, as {hero.name} wore {hero.loves}.",
    ],
    "walk": [
        "{hero} {went!} to the {room.name} and {found!} {friend.name} there.",
        "{hero} {went!} {how!} from the {room.name} to the {hall.name}, because {reason!}.",
        "After {n!} days {hero} reached {away.name}, where the {away.people} sell {away.product}.",
        "{hero} crossed the {away.river} by the {away.landmark} and {felt!} {mood!}.",
        "Outside, {sky!}, and {hero} had only {hero.his} {thing.name}.",
        "{friend} {went!} behind {hero.him}, and neither of them spoke.",
        "At the {room.name} {hero} met {stranger.name}, a {craft.name} from {away.name}.",
        "The road from {home.name} to {away.name} was long, and {hero} {felt!} {mood!}.",
        "When {hero} came to the {hall.name}, {sky!}.",
    ],
    "find": [
        "There {hero} {found!} a {adj~gift} {gift.name}, which somebody had left {since!}.",
        "Under the {adj~tool} {tool.name} lay a {adj~gift} {gift.name} made of {gift.stuff}.",
        "{hero} {took!} the {gift.name} {how!} and put it beside {hero.his} {thing.name}.",
        "{friend} had never seen such a {gift.name}, for {friend.his} own was {adj!} and {adj!}.",
        "With the {gift.name} one could {gift.use}, and with the {thing.name} one could {thing.use}.",
        "The {adj~gift} {gift.name} belonged to {stranger.name}, who had lost it {since!}.",
        "{hero} gave the {adj~gift} {gift.name} to {friend.name}, and {friend.he} {took!} it {how!}.",
    ],
    "talk": [
        '"{plea}" {said!} {hero.name}. "{answer}" {said!} {friend.name}.',
        '"{question}" {asked!} {friend.name}. "{answer}" {said!} {hero.name} {how!}.',
        '{hero.name} looked at {friend.name} and {said!}: "{plea}"',
        '"{question}" {asked!} {hero.name}, but {friend.name} only {said!}: "{answer}"',
        '"{plea}" {said!} {friend.name}, and {friend.he} {took!} the {thing.name}.',
        '"My {kin!} always told me that {trade.lesson}," {said!} {hero.name}.',
    ],
    "plea": [
        "Give me the {adj~thing} {thing.name}, my friend.",
        "I must go to {away.name} before {day!}.",
        "We cannot stay here, because {reason!}.",
        "Please do not tell {stranger.name} about the {thing.name}.",
        "I am {mood!}, and {reason!}.",
        "Come with me to the {room.name}, and bring the {thing.name}.",
        "In {home.name} we have {home.product}, but no {away.product}.",
        "I want to {trade.task}, and then I will {thing.use}.",
    ],
    "question": [
        "Where is the {adj~thing} {thing.name}?",
        "Have you been to {away.name}?",
        "Who taught you to {trade.task}?",
        "Why are you so {mood!}?",
        "Did {stranger.name} come to the {room.name}?",
        "What can one do with a {thing.name}?",
        "How far is it to the river {away.river}?",
    ],
    "answer": [
        "Bring me {stranger.likes}, then {stranger.name} will play {stranger.plays} with you.",
        "Let us ask {stranger.name}, the one in the {stranger.loves} coat.",
        "It is in the {room.name}, where {stranger.name} left it.",
        "A {thing.name} is there to {thing.use}.",
        "No, because {reason!}.",
        "Yes, {since!}, with my {kin!}.",
        "Ask {stranger.name}, for I am only a {trade.name}.",
        "The {away.people} of {away.name} know it better than I do.",
        "You are only {mood!}, and {reason!}.",
        "I do not know, but {trade.lesson}.",
    ],
    "back": [
        "In the end {hero} {went!} back to {home.name}, and the {adj~thing} {thing.name} stayed with {friend.name}.",
        "That {hour!} {hero.name} and {friend.name} sat in the {room.name}, and {sky!}.",
        "Since then {hero} has been {mood!}, and {hero.his} {thing.name} hangs in the {room.name}.",
        "{hero.name} never saw {stranger.name} again.",
        "So {hero.name} {family.name} learned that {trade.lesson}.",
        "When {hero} came home to the {home.river}, {sky!}.",
    ],
    "mood_line": [
        "{hero.name} and {stranger.name} played {stranger.plays} and ate {stranger.likes}.",
        "{friend} dreamed of {friend.fears}, and {hero.name} put on {hero.his} {hero.loves} coat.",
        "In {friend.born}, when {friend.name} was born, {sky!}.",
        "{hero} {felt!} {mood!}, but {friend.name} {felt!} {mood!}.",
        "{friend} was {nature~friend}, and {hero} was {nature~hero}.",
        "{hero.name} {felt!} {mood!}, because {reason!}.",
    ],
    "work": [
        "{hero.name} was a {trade.name} and worked in the {trade.place} of {home.name}.",
        "Every {hour!} {hero} had to {trade.task}, and for that {hero} needed a {trade.tool}.",
        "{hero} sold {trade.ware} to the {home.people}, who paid {n!} {coin!} for them.",
        "{friend.name} the {craft.name} came into the {trade.place} and bought {n!} {trade.ware}.",
        "In the {trade.place} stood a {adj~tool} {tool.name}, and nobody but {hero.name} could {tool.use} with it.",
        "{friend} did not like to {trade.task}; {friend.he} would rather {craft.task} in the {craft.place}.",
        "{hero} {took!} the {trade.tool} {how!} and began to {trade.task}.",
        "{title} {family.name} wanted {trade.ware} by {day!}.",
    ],
    "title": ["Mr.", "Mrs.", "Old", "Young"],
    "count": [
        "{hero} had {n} {fruit~hero} and gave {m} of them to {friend.name}, so {rest} {fruit~hero} were left.",
        "{hero} bought {n} {fruit~hero} and {friend.name} brought {m} more, which made {sum} {fruit~hero} in all.",
        "There were {n} {fruit~hero} in the basket; {friend.name} ate {m}, and {rest} remained.",
        "{hero} counted {n} {coin~hero} on the table and {m} in {hero.his} pocket, and that was {sum} {coin~hero}.",
    ],
    "trade_talk": [
        '"{n!} {coin~hero} for the {adj~thing} {thing.name}," {said!} {hero.name}.',
        '"That is too much for a {thing.name} made of {thing.stuff}," {said!} {friend.name}.',
        '"My {thing.name} is {adj!}, and it can {thing.use}," {said!} {hero.name} {how!}.',
        '"Then I will give you {n!} {fruit~hero} and a {adj~gift} {gift.name}," {said!} {friend.name}.',
        "{friend} {took!} the {thing.name} {how!} and paid {n!} {coin~hero}.",
        "{stranger.name}, a {nature~stranger} {craft.name}, stood in the {room.name} and {said!} nothing.",
        "The {home.people} of {home.name} {said!} that {trade.lesson}.",
    ],
    "town_fact": [
        "{home.name} is a town in {home.region}, on the river {home.river}.",
        "{home.name} is known for its {home.product} and for the {home.landmark}.",
        "Most people in {home.name} are {home.people}, and they sell {home.product} to {away.name}.",
        "The {home.landmark} of {home.name} was built {since!}.",
        "In {month!} the {home.river} is high, and {sky!}.",
        "{away.name}, in {away.region}, has no {home.product}, but its {away.product} is famous.",
        "The road from {home.name} to {away.name} follows the {away.river} for {n!} miles.",
        "Every {season!} the {away.people} of {away.name} come to {home.name} to see the {home.landmark}.",
        "Its {trade.place} is {adj!}, and the {trade.name} sells {trade.ware}.",
    ],
    "beast_fact": [
        "A {animal.name} is a {animal.trait} animal that eats {animal.food} and lives in the {animal.home}.",
        "The {animal.name} fears the {animal.enemy}, and the {beast.name} fears the {beast.enemy}.",
        "{hero} had a {animal.trait} {animal.name} and gave it {animal.food} every {hour!}.",
        "In the {animal.home} near {home.name} lived a {nature~animal} {animal.name}.",
    ],
    "beast_act": [
        "The {animal.name} {animal.sound} and ran to the {animal.home}.",
        "A {beast.name} came out of the {beast.home} and {beast.sound}.",
        "The {animal.name} ate the {animal.food}, and the {beast.name} looked for {beast.food}.",
        "{hero} heard how the {animal.name} {animal.sound}, and {hero.he} {felt!} {mood!}.",
        '"You are a {animal.trait} {animal.name}," {said!} {hero.name}, and the {animal.name} {animal.sound}.',
        "{friend} wanted to sell the {animal.name} for {n!} {coin~hero}, but {hero} {felt!} {mood!}.",
        "Suddenly the {animal.enemy} was there, and the {animal.trait} {animal.name} {animal.sound} {how!}.",
        "The {nature~beast} {beast.name} and the {animal.trait} {animal.name} slept in the {room.name}.",
    ],
    "letter_open": ["Dear {friend.name}, I am writing to you from {away.name}, where {sky!}."],
    "letter": [
        "In {hero.born} I shall be a year older; will you bring me {hero.likes} and play {hero.plays} with me?",
        "I have made you a {friend.loves} scarf, and there are no {friend.fears} here.",
        "The {away.people} here sell {away.product}, and I have seen the {away.landmark}.",
        "I think of {home.name} and of the {home.river} every {hour!}.",
        "My {adj~thing} {thing.name} is still with me, so that I can {thing.use}.",
        "I have found work in a {trade.place}, where I {trade.task}; the {trade.name} is {nature~trade}.",
        "Do you still have the {adj~gift} {gift.name}, {friend.name}?",
        "Yesterday I met {stranger.name}, who asked about you and {felt!} {mood!}.",
        "Last {day!} I was {mood!}, because {reason!}.",
        "Please send me {n!} {coin!} and the {gift.name} before {month!}.",
        "Tell {stranger.name} that {trade.lesson}.",
    ],
    "letter_close": [
        "Yours, {hero.name} {family.name}.",
        "With love to you and {stranger.name}, your {hero.sibling} {hero.name}.",
    ],
    "diary": [
        "{hero.name} spoke of {hero.fears} all {hour!}, so we played {hero.plays}.",
        "I gave {friend.name} a {friend.loves} ribbon and {n!} {friend.likes},"
        " for {friend.he} was born in {friend.born}.",
        "{day!}, {month~hero}: {sky!}, and I {took!} the {adj~thing} {thing.name}.",
        "{hero.name} came to the {room.name}, and {hero.he} {felt!} {mood!}.",
        "I {went!} to the {hall.name} with {hero.name} and {found!} a {adj~gift} {gift.name}.",
        "{hero} told me about {away.name}, about the {away.landmark} and the {away.people}.",
        "We ate {fruit~hero} and spoke of {friend.name}, the {craft.name}, who cannot {craft.task} any more.",
        "{friend} wrote that {reason!} and that {friend.he} was {mood!}.",
        "The {adj~thing} {thing.name} is gone, and {hero.name} says that {friend.name} {took!} it.",
        "I {felt!} {mood!} all {hour!}, because {reason!}.",
    ],
    "trade_fact": [
        "A {trade.name} works in a {trade.place} and makes or sells {trade.ware}.",
        "The most important thing for a {trade.name} is a {trade.tool}.",
        "To be a {trade.name} one must {trade.task} every {hour!}, and one learns that {trade.lesson}.",
        "A {craft.name}, on the other hand, has a {craft.tool} and sells {craft.ware}.",
        "In {home.name} there are {n} {home.people} and only {m} who can {trade.task}.",
        "Whoever wants {craft.ware} goes to the {craft.place}, and whoever wants {trade.ware} goes"
        " to the {trade.place}.",
    ],
}
