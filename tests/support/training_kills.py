"""Training runs that are killed. A request holds the recipe's `values`, and `seconds` after which a timer kills it."""

from typing import Any

from kills import KillServer, serve


class KilledTraining(KillServer):
    program = __file__

    def run(self, values: dict[str, Any], seconds: float | None = None) -> int:
        return self.ask({"values": values, "seconds": seconds})


def _serve() -> None:
    from modeling_deepseek_moe.finetune.recipe.load import make_recipe
    from modeling_deepseek_moe.finetune.train import one_run as train

    serve(lambda request: train.run(make_recipe(request["values"])))


if __name__ == "__main__":
    _serve()
