"""Everyday questions that the parent answers to make chat text for distillation.

Written for this project. `JUDGED` are ten questions for looking at the finished model's answers; they and
their topics are left out of what `training_questions` returns.
"""

from __future__ import annotations

import random

JUDGED = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Give me three tips for sleeping better.",
    "Write a short poem about the sea.",
    "What is the difference between a cat and a dog?",
    "Explain what a computer does in simple words.",
    "What should I pack for a weekend trip?",
    "Who was Albert Einstein?",
    "Tell me a short story about a brave mouse.",
)
"""Never trained on."""

# Topics, one list a line of `FORMS`, parted by bars.
COUNTRIES = "Italy|Spain|Germany|Japan|India|China|Egypt|Canada|Brazil|Mexico|Russia|Greece|Norway|Kenya|Australia"
THINGS = (
    "the moon|rain|a rainbow|an earthquake|a volcano|gravity|electricity|photosynthesis|the internet|a battery|a magnet|"
    "the heart|the brain|a bicycle|an airplane|a telephone|a clock|money|a bank|democracy|the sun|a planet|a star|"
    "the ocean|a river|a forest|bread|cheese|coffee|tea|chocolate|sugar|salt|music|a piano|a guitar|football|chess|"
    "a library|a school|a hospital|the Roman Empire|the Renaissance|the water cycle|climate change|recycling|a vaccine|"
    "a virus|protein|vitamins|inflation|a loan|a novel|a poem|grammar|a verb|an adjective|a fraction|algebra|geometry|"
    "a program|a robot|a satellite|a telescope|a microscope|an atom|a molecule|light|sound|heat|ice|wind|a desert"
)
TASKS = (
    "make pancakes|cook rice|bake bread|make a cup of tea|cook pasta|make a salad|clean a window|wash a car|fix a flat tyre|"
    "learn a language|learn to swim|learn to play the guitar|save money|find a job|write a letter|write an email to my boss|"
    "study for an exam|make new friends|stay healthy|lose weight|start running|grow tomatoes|plant a tree|train a dog|"
    "take care of a plant|paint a room|plan a birthday party|prepare for an interview|give a speech|read more books|"
    "remember names|manage my time|reduce stress|stop procrastinating|remove a stain|tie a tie|sew a button|change a light bulb"
)
PEOPLE = (
    "Isaac Newton|Marie Curie|William Shakespeare|Leonardo da Vinci|Mozart|Charles Darwin|Galileo|Abraham Lincoln|"
    "Cleopatra|Julius Caesar|Mahatma Gandhi|Nelson Mandela|Ada Lovelace|Alan Turing|Beethoven|Aristotle|Napoleon"
)
SUBJECTS = (
    "winter|spring|a mountain|a friend|the night|an old house|a garden|the rain|a journey|a lost key|a kind teacher|"
    "a little bird|a lonely robot|two brothers|a clever fox|a lighthouse|a baker|a long train ride|the first day of school"
)
FORMS = {
    "COUNTRIES": ("What is the capital of {}?", "Tell me about {}.", "What food is {} known for?", "What should I see in {}?"),
    "THINGS": (
        "What is {}?",
        "How does {} work?",
        "Explain {} to a child.",
        "Why is {} important?",
        "Give me three facts about {}.",
        "Describe {} in two sentences.",
    ),
    "TASKS": ("How do I {}?", "Give me three tips to {}.", "What do I need to {}?", "What is the best way to {}?"),
    "PEOPLE": ("Who was {}?", "What is {} known for?", "Tell me about the life of {}."),
    "SUBJECTS": ("Write a short story about {}.", "Write a poem about {}.", "Write two sentences about {}."),
}
SINGLE = (
    "Hello!",
    "How are you?",
    "What can you do?",
    "Tell me a joke.",
    "What is 2 + 2?",
    "What day comes after Monday?",
    "Thank you for your help.",
    "What is your name?",
    "Can you help me with my homework?",
    "What is the largest ocean?",
    "Which planet is closest to the sun?",
    "How many days are in a year?",
    "What colour do you get from blue and yellow?",
    "What is a good name for a cat?",
    "Recommend me a book.",
    "What should I cook tonight?",
    "I feel sad today.",
    "I am bored. What can I do?",
    "How many legs does a spider have?",
    "What is the opposite of hot?",
    "Translate 'good morning' into French.",
    "Correct this sentence: He go to school yesterday.",
    "Rewrite this more politely: Give me the report now.",
    "List five fruits.",
    "List four seasons.",
    "Name three animals.",
)


def training_questions(seed: int) -> list[str]:
    """All questions but the judged ones, in a shuffled order that the seed fixes."""
    lists = {"COUNTRIES": COUNTRIES, "THINGS": THINGS, "TASKS": TASKS, "PEOPLE": PEOPLE, "SUBJECTS": SUBJECTS}
    questions = [form.format(topic) for kind, forms in FORMS.items() for form in forms for topic in lists[kind].split("|")]
    questions += list(SINGLE) * 2
    random.Random(seed).shuffle(questions)
    return questions
