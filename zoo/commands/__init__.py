"""The commands of ``pyrozoo``, which ``pyrozoo.zoo.cli`` puts together.

=============== ================================================================
looking         list, show, compare
training        train, sweep, reproduce, results
using           report, predict, sample: what is done with a run folder
options         what several commands take, and how the text of it is read
screen          where everything is printed
=============== ================================================================

Whatever is slow to import is imported inside the command that needs it.
"""
