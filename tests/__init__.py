"""What is imported makes much, and the garbage collector would go through it again and again, a tenth of the time:
``conftest.py`` switches it on when all is imported."""

import gc

gc.disable()
