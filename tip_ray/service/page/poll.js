// Asking again and again: never twice at once, not while nobody looks, slower while it fails.

const SLOWEST_S = 30;

/**
 * Run `work` now and then every `pauseS()` seconds; returns a function that ends it.
 * `heard` gets null after a success and the error after a failure.
 */
export function poll(work, pauseS, heard) {
  let timer = 0;
  let ended = false;
  let failures = 0;

  async function round() {
    clearTimeout(timer);
    try {
      await work();
      failures = 0;
      if (!ended) heard(null);
    } catch (error) {
      failures += 1;
      if (!ended) heard(error);
    }
    if (!ended) timer = setTimeout(next, 1000 * Math.min(SLOWEST_S, pauseS() * 2 ** failures));
  }

  function next() {
    if (document.hidden) document.addEventListener("visibilitychange", next, { once: true });
    else if (!ended) round();
  }

  round();
  return () => {
    ended = true;
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", next);
  };
}
