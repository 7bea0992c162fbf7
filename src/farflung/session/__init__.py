"""The driver: one generation over a route of stages.

async with Swarm.connect("http://127.0.0.1:7700", "gemma3-270m") as swarm:
    async for token in swarm.generate("The sea is"):
        print(token.text, end="")
"""

from farflung.session.generation import Generation, Token
from farflung.session.options import GenerateOptions
from farflung.session.stats import GenerationStats, StageStats
from farflung.session.swarm import Swarm

__all__ = ["GenerateOptions", "Generation", "GenerationStats", "StageStats", "Swarm", "Token"]
