"""Environments for the tests, reached as toy_envs:Name-v0, and data for them."""

import time
from pathlib import Path

import gymnasium
import numpy as np

DIM = 4
RADIUS = 0.5


def unit(rng, n):
    x = rng.normal(size=(n, DIM))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def is_paid(s, a):
    """An action pays if it is as long as the data's, and points where the observation does."""
    norm = np.linalg.norm(a, axis=-1)
    return (np.abs(norm - RADIUS) < 0.15) & ((s * a).sum(-1) > 0.6 * norm)


def bandit_data(n, seed=0):
    """Episodes of one step, whose actions lie near a sphere. One in eight is paid."""
    rng = np.random.default_rng(seed)
    s = unit(rng, n)
    a = RADIUS * unit(rng, n) + 0.02 * rng.normal(size=(n, DIM))
    return dict(
        observations=np.repeat(s, 2, axis=0),
        actions=np.repeat(a, 2, axis=0),
        rewards=np.repeat(is_paid(s, a) - 1.0, 2),
        terminals=np.tile([0, 1], n),
        masks=np.zeros(2 * n),
    )


class Bandit(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (DIM,))
    action_space = gymnasium.spaces.Box(-1, 1, (DIM,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = unit(self.np_random, 1)[0].astype(np.float32)
        return self.s, {}

    def step(self, action):
        paid = bool(is_paid(self.s, action))
        return self.s, paid - 1.0, True, False, {"success": paid}


class Counting(gymnasium.Env):
    """The seed of a reset is an episode's number n, from which its length and success follow.

    It observes n and the time, pays the action, and its frames become brighter. Variants of it
    are registered below.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Box(-2, 2, (1,))  # not [-1, 1]: rescaled
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    tells = (True, False)  # what of success
    seconds = 0  # that a step takes: then a file says that an episode is being played

    def __init__(self, render_mode=None, **variant):
        self.render_mode = render_mode
        vars(self).update(variant)

    def render(self):
        return np.full((32, 48, 3), 4 * self.t, np.uint8)

    def observe(self):
        return np.array([self.n, self.t], np.float32)

    @staticmethod
    def length(n):
        return 1 + 7 * n % 13

    def reset(self, *, seed=None, options=None):
        self.n = seed or 0
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        if self.seconds:
            Path("is_played").touch()
            time.sleep(self.seconds)
        self.t += 1
        is_over = self.t == self.length(self.n)
        is_solved = self.n % 3 == 0
        info = {"success": is_solved} if is_solved in self.tells else {}
        return self.observe(), float(action[0]), is_over, False, info


class Film(Counting):
    """Images of noise, other ones at each n and time. An episode ends after seven steps."""

    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)

    def observe(self):
        rng = np.random.default_rng((self.n, self.t))
        return rng.integers(0, 256, (8, 8, 3), np.uint8)

    @staticmethod
    def length(n):
        return 7


def film_data(episodes):
    """The episodes 0 ... of Film. Its actions tell the rows apart."""
    env = Film()
    images = []
    for n in range(episodes):
        images.append(env.reset(seed=n)[0])
        images += [env.step([0])[0] for _ in range(7)]
    rows = np.arange(len(images))
    return dict(
        observations=np.array(images),
        actions=np.linspace(-0.9, 0.9, len(rows))[:, None],
        rewards=np.ones(len(rows)),
        terminals=(rows % 8 == 7).astype(float),
    )


def is_along(action, velocity):
    """Whether it points along rather than against. Half of all directions do."""
    return (action * velocity).sum(axis=-1) > 0


class Drift(gymnasium.Env):
    """A white square drifts diagonally, leaves the image and comes in on the other side.

    Actions along its velocity pay. One image does not tell the velocity: whatever it is, the
    square may be anywhere at any time. Success is that the last action pays.
    """

    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1, 1, (2,))
    length = 16

    def observe(self):
        image = np.zeros((8, 8, 3), np.uint8)
        image[:2, :2] = 255
        return np.roll(image, self.place, axis=(0, 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.place = self.np_random.integers(0, 8, 2)
        self.velocity = self.np_random.choice([-1, 1], 2)
        return self.observe(), {}

    def step(self, action):
        paid = bool(is_along(action, self.velocity))
        self.place = self.place + self.velocity
        self.t += 1
        return self.observe(), paid - 1.0, self.t == self.length, False, {"success": paid}


def drift_data(episodes, seed):
    """Episodes of Drift with actions in all directions, and the velocity at every row."""
    env = Drift()
    env.reset(seed=seed)
    images, velocity = [], []
    for _ in range(episodes):
        images.append(env.reset()[0])
        images += [env.step(np.zeros(2))[0] for _ in range(env.length)]
        velocity += [env.velocity] * (env.length + 1)
    actions = np.random.default_rng(seed).normal(size=(len(images), 2))
    actions /= np.linalg.norm(actions, axis=1, keepdims=True)
    data = dict(
        observations=np.array(images),
        actions=actions,
        rewards=is_along(actions, np.array(velocity)) - 1.0,
        terminals=np.tile([0] * env.length + [1], episodes),
        masks=np.zeros(len(images)),  # no action changes what comes later
    )
    return data, np.array(velocity)


class BrokenStep(Counting):
    def step(self, action):
        return self.no_such_thing


class BrokenInit(Counting):
    def __init__(self, render_mode=None):
        self.no_such_thing.reset()


VARIANTS = dict(
    Counting={},
    Silent=dict(tells=()),
    Proud=dict(tells=(True,)),
    Discrete=dict(action_space=gymnasium.spaces.Discrete(3)),
    Slow=dict(seconds=0.1),
    Stuck=dict(seconds=30),
)
for name, variant in VARIANTS.items():
    gymnasium.register(f"{name}-v0", "toy_envs:Counting", kwargs=variant)
for name in ("Bandit", "Film", "Drift", "BrokenStep", "BrokenInit"):
    gymnasium.register(f"{name}-v0", f"toy_envs:{name}")
