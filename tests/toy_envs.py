"""Gymnasium environments for the tests, reached as toy_envs:Name-v0, and what their datasets are made of."""

import multiprocessing
import os
import sys
import time

import gymnasium
import numpy as np

DIM, RADIUS = 4, 0.5


def unit(rng, n=None):
    x = rng.normal(size=(n or 1, DIM))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x if n else x[0]


def is_paid(s, a):
    """An action pays if it keeps the norm that the data have and points where the observation does."""
    norm = np.linalg.norm(a, axis=-1)
    return (np.abs(norm - RADIUS) < 0.15) & ((s * a).sum(-1) > 0.6 * norm)


def bandit_data(n, seed=0):
    """One-step episodes whose actions lie near a sphere, whatever the observation: about one in eight is paid."""
    rng = np.random.default_rng(seed)
    s, a = unit(rng, n), RADIUS * unit(rng, n) + 0.02 * rng.normal(size=(n, DIM))
    rows = dict(observations=np.zeros((n, 2, DIM)), actions=np.zeros((n, 2, DIM)), rewards=np.zeros((n, 2)),
                terminals=np.tile([0, 1], (n, 1)), masks=np.zeros((n, 2)))
    rows["observations"][:, 0], rows["actions"][:, 0], rows["rewards"][:, 0] = s, a, is_paid(s, a) - 1.0
    return {key: x.reshape(2 * n, *x.shape[2:]) for key, x in rows.items()}


MODES, SHARES = RADIUS * np.eye(DIM)[:3], (0.6, 0.3, 0.1)


def modes_data(n, seed=0):
    """One-step episodes whose actions lie at one of three points, so often."""
    rng = np.random.default_rng(seed)
    data = bandit_data(n, seed)
    data["actions"][::2] = MODES[rng.choice(3, n, p=SHARES)] + 0.02 * rng.normal(size=(n, DIM))
    return data


class Bandit(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (DIM,))
    action_space = gymnasium.spaces.Box(-1, 1, (DIM,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = unit(self.np_random)
        return self.s.astype(np.float32), {}

    def step(self, action):
        paid = is_paid(self.s, action)
        return self.s.astype(np.float32), paid - 1.0, True, False, {"success": bool(paid)}


class Counting(gymnasium.Env):
    """Episode lengths, rewards and success follow from the reset seed alone; the observation tells seed and time."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-2, 2, (1,))  # not [-1, 1]: rescaled
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    reports_success = True

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 48, 3), 4 * self.t, np.uint8)

    def reset(self, *, seed=None, options=None):
        assert seed is not None, "every episode is reset with a seed"
        assert "jax" not in sys.modules or multiprocessing.parent_process() is None, "JAX in a worker"
        self.n, self.t = seed, 0
        return np.array([self.n, self.t], np.float32), {}

    @staticmethod
    def length(seed):
        return 1 + 7 * seed % 13

    def step(self, action):
        self.t += 1
        info = {"success": self.n % 3 == 0} if self.reports_success else {}
        observation = np.array([self.n, self.t], np.float32)
        return observation, float(action[0]), self.t == self.length(self.n), False, info


class Silent(Counting):
    reports_success = False


class Faulty(Counting):
    """Does in its step what the environment variable FAULT says, and notes in the file CLOSED that it is closed."""

    def step(self, action):
        match os.environ.get("FAULT"):
            case "dies":
                os._exit(1)
            case "hangs":
                time.sleep(1000)
            case "fails":
                raise ValueError("its joints ache")
            case "fails and cannot say":
                raise ValueError(lambda: "what cannot be pickled")
        return super().step(action)

    def close(self):
        if path := os.environ.get("CLOSED"):
            with open(path, "a") as file:
                print("closed", file=file)


class Invisible(Counting):
    def render(self):
        return None


class Stuck(Counting):
    def __init__(self):
        if multiprocessing.parent_process():
            time.sleep(1000)


class Keyed(Counting):
    observation_space = gymnasium.spaces.Dict(dict(position=Counting.observation_space))


class Discrete(Counting):
    action_space = gymnasium.spaces.Discrete(3)


class Unbounded(Counting):
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))


class Half(Counting):  # described in several lines
    action_space = gymnasium.spaces.Box(np.array([-1] * 9 + [-np.inf]), np.ones(10), dtype=np.float64)


for name in ("Bandit", "Counting", "Silent", "Faulty", "Stuck", "Invisible", "Keyed", "Discrete", "Unbounded", "Half"):
    gymnasium.register(f"{name}-v0", f"toy_envs:{name}")
