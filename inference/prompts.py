"""Openings for the model to continue, by kind of story; all were written for this project and are in the public domain.

    python generate.py --creative

Only letters and plain punctuation, so that models with a small alphabet can read them.
"""

from __future__ import annotations

GALLERY: dict[str, tuple[str, ...]] = {
    "A ghost story": (
        "The house had stood empty for eleven winters when I took the key from the agent's hand, and it was not until "
        "I had climbed to the second landing that I heard",
        "There is nobody in that room, said the housekeeper; and she did not look towards the door as she said it.",
        "My uncle left me his clock, his debts, and one strict instruction: that the clock must never be allowed to",
        "On the last night of October the sexton counted the graves, as he had done these forty years, and found one",
    ),
    "On the railway": (
        "The mail had gone through at midnight, and the signalman was alone with his lamp and his kettle when the bell",
        "It was upon the platform at Harrow Junction, in a fog that tasted of iron, that I first observed the gentleman",
        "The compartment held four persons and a parrot, and for thirty miles not one of the five had spoken, until",
        "No train had stopped at Withy Halt since the accident, and yet every evening the porter swept the platform and",
    ),
    "A detective tale": (
        "The inspector laid the broken watch upon the table, turned it twice with the tip of his pencil, and said",
        "Nothing whatever had been stolen, which was precisely what alarmed Miss Pell, for",
        "There were three doors to the study, all of them locked, and under the desk lay",
        "I have been a police surgeon for twenty years, and I never signed a certificate so unwillingly as on the morning",
    ),
    "In the drawing-room": (
        "Lady Harriet put down her cup and looked across the carpet at the young man who had come to ask for her",
        "It was generally agreed in Mallow Street that the new curate was handsome, and that his sister was not; but",
        "Mrs. Pomfret never repeated gossip; she merely enquired of her friends whether they had heard that",
        "The engagement had lasted nine years, and nobody was more astonished than the parties to it when",
    ),
    "At sea": (
        "We had been nine days out of Bristol when the wind went round to the north, and the cook came aft to say",
        "The old pilot shaded his eyes and looked towards the bar, where the water broke white over",
        "Of the eleven men who took to the boat that night, I alone can tell what was in the captain's box; for",
        "The island is on no chart that I have seen, though I lived upon it for two years and kept",
    ),
    "A letter": (
        "My dear Sister, You will have heard from Aunt Margaret that we are come safe to the Rectory, but she cannot "
        "have told you",
        "Sir, I return your umbrella by the bearer, and with it the enclosed paper, which I found inside the handle and",
        "My dearest Tom, By the time this reaches you the snow will have closed the pass, and so I must set down tonight",
        "Honoured Father, You bade me write on the first Sunday of the month and to conceal nothing, therefore",
    ),
    "For children": (
        "Once upon a time there was a little girl who lived at the end of a long lane, and every morning",
        "Tom had a small brown dog named Button. One day Button ran into the garden and found",
        "The smallest of the seven kettles was sad, because nobody ever asked it to",
        "Far up the hill, where the grass is blue in the evening, a young giant sat down and began to cry. Why, said "
        "the hare,",
    ),
    "Verse": (
        "The rain came over the barley,\nThe lamp went out on the stair,\n",
        "O bell that rings below the tide,\nWho pulls thy rope tonight?\n",
        "I met a tinker on the moor\nWith all his pans a-shine,\n",
        "When I was young and owned no coat,\nThe winter was my own;\n",
    ),
    "The stage": (
        "DUKE:\nWho keeps the northern gate? Let him be brought.\n\nSERVANT:\n",
        "FIRST WITCH:\nThe pot is cold, the coals are dead.\n\nSECOND WITCH:\n",
        "QUEEN:\nI had a brother once that loved the sea.\n\nGENTLEWOMAN:\n",
        "FOOL:\nGood master, lend me but thy crown an hour,\n",
    ),
}
